"""Stock architectures: an upcycled model as a checkpoint that loads anywhere, without this package."""

from .build import build_model, choose_layout
from .gate import check_equal_logits
from .layout import Layout, MoeLayout
from .weights import UpcycledWeights

__all__ = ["Layout", "MoeLayout", "UpcycledWeights", "build_model", "check_equal_logits", "choose_layout"]
