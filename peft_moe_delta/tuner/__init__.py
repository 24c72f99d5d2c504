"""The tuner in PEFT's own parts: `config`, `layer`, and `base`, to which `model` above gives a user's verbs.

`record` is what a config has filled in, `context` carries languages in and losses out, `settings` says who may do what,
`blocks` finds the MLPs, `experts` makes experts from one, `router` scores them, `attention` mixes attention modules,
`vocabulary` adds rows for new tokens, `initialisation` fills experts from checkpoints, `growing` adds languages to a
trained adapter, `fingerprint` knows the base model, `recording` writes down where tokens go, `agreement` compares that
between two models.
"""

from .agreement import route_agreement
from .base import MoeDeltaTuner
from .config import MoeDeltaConfig
from .layer import MoeDeltaLayer
from .record import AdapterRecord

__all__ = ["AdapterRecord", "MoeDeltaConfig", "MoeDeltaLayer", "MoeDeltaTuner", "route_agreement"]
