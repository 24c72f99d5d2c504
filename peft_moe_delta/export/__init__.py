"""Stock architectures: an upcycled model as a checkpoint that loads anywhere, without this package."""

from .build import build_model
from .choice import Fit, choose_layout, stock_fits
from .gate import check_equal_logits, random_batch
from .layout import Layout, MoeLayout, ReplicatedLayout
from .weights import LazyTensors, UpcycledWeights

__all__ = [
    "Fit",
    "Layout",
    "LazyTensors",
    "MoeLayout",
    "ReplicatedLayout",
    "UpcycledWeights",
    "build_model",
    "check_equal_logits",
    "choose_layout",
    "random_batch",
    "stock_fits",
]
