"""The tuner in PEFT's own parts: `config`, `layer`, `model`, `registration`.

`record` is what a config has filled in, `context` carries languages in and losses out, `settings` says who may do what,
`blocks` finds the MLPs, `experts` makes experts from one, `router` scores them, `attention` mixes attention modules,
`vocabulary` adds rows for new tokens, `initialisation` fills experts from checkpoints, `growing` adds languages to a
trained adapter, `fingerprint` knows the base model, `recording` writes down where tokens go, `agreement` compares that
between two models.
"""

from .agreement import route_agreement
from .config import MoeDeltaConfig
from .layer import MoeDeltaLayer
from .model import MoeDeltaModel
from .record import AdapterRecord
from .registration import register

__all__ = ["AdapterRecord", "MoeDeltaConfig", "MoeDeltaLayer", "MoeDeltaModel", "register", "route_agreement"]
