"""Stock architectures: an upcycled model as a checkpoint that loads anywhere, without this package."""

from .build import build_model
from .choice import Fit, choose, choose_layout, every_fit, explain_choice, stock_fits
from .gate import check_equal_logits
from .layout import Layout, MoeLayout, ReplicatedLayout
from .remote_code import RemoteCodeLayout
from .weights import AttentionWeights, IdentifierWeights, LazyTensors, UpcycledWeights

__all__ = [
    "AttentionWeights",
    "Fit",
    "IdentifierWeights",
    "Layout",
    "LazyTensors",
    "MoeLayout",
    "RemoteCodeLayout",
    "ReplicatedLayout",
    "UpcycledWeights",
    "build_model",
    "check_equal_logits",
    "choose",
    "choose_layout",
    "every_fit",
    "explain_choice",
    "stock_fits",
]
