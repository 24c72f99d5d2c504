"""The tuner in PEFT's own parts: `config`, `layer`, `model`, `registration`.

`context` carries languages in and losses out, `experts` makes experts from an MLP, `fingerprint` knows the base model,
`grafting` moves an adapter onto a post-trained model, `agreement` compares the routes of two models, `explain` says
what an adapter can be shipped as.
"""

from .agreement import route_agreement
from .config import MoeDeltaConfig
from .layer import MoeDeltaLayer
from .model import MoeDeltaModel
from .registration import register

__all__ = ["MoeDeltaConfig", "MoeDeltaLayer", "MoeDeltaModel", "register", "route_agreement"]
