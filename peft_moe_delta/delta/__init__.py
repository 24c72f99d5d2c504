"""Post-training deltas: what instruction tuning changed, and how it is added to experts. Tensors and files only."""

from .agreement import ExpertAgreement, expert_agreement
from .arithmetic import all_finite, graft_tensor, low_rank_weight, rounded
from .picture import draw_delta
from .post_training import PostTrainingDelta
from .report import DeltaReport, FamilyDelta
from .scale import Scale, scale_of_groups
from .stored import DeltaFile, combine_deltas
from .vocabulary import VocabularyMap

__all__ = [
    "DeltaFile",
    "DeltaReport",
    "ExpertAgreement",
    "FamilyDelta",
    "PostTrainingDelta",
    "Scale",
    "VocabularyMap",
    "all_finite",
    "combine_deltas",
    "draw_delta",
    "expert_agreement",
    "graft_tensor",
    "low_rank_weight",
    "rounded",
    "scale_of_groups",
]
