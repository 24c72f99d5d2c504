"""Grafting: an adapter trained on the base model moves onto the post-trained one.

In: an upcycled base model and its post-trained sibling. Out: the same experts over the post-trained model, with the
post-training delta on every expert (DeltaMoE, arXiv 2605.18083).

`adapter` gives a PEFT model (`graft`); `standalone` goes on from there and gives a stock one (`merge_and_graft`).
`checks` says which models belong together, `weights` reads a model in memory, and `report` is what is told of it all.
The model that is grafted from is never changed: un-grafting means using it again.
"""

from .adapter import Validation, graft, grafted_adapter
from .checks import check_has_delta, check_same_kind
from .report import GraftReport
from .standalone import exported_share, merge_and_graft, to_stock, why_not_encodable

__all__ = [
    "graft",
    "merge_and_graft",
    "to_stock",
    "GraftReport",
    "Validation",
    "grafted_adapter",
    "exported_share",
    "why_not_encodable",
    "check_has_delta",
    "check_same_kind",
]
