"""Stock architectures: an upcycled model as a checkpoint that loads anywhere, without this package."""

from .build import build_model
from .choice import (
    MOE_LAYOUTS,
    Fit,
    choose,
    choose_layout,
    choose_remote_code,
    every_fit,
    explain_choice,
    stock_fits,
    traits_of,
    traits_of_export,
    with_engines,
)
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
    "MOE_LAYOUTS",
    "MoeLayout",
    "RemoteCodeLayout",
    "ReplicatedLayout",
    "UpcycledWeights",
    "build_model",
    "check_equal_logits",
    "choose",
    "choose_layout",
    "choose_remote_code",
    "every_fit",
    "explain_choice",
    "stock_fits",
    "traits_of",
    "traits_of_export",
    "with_engines",
]
