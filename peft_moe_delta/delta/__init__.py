"""Post-training deltas: what instruction tuning changed, and how it is added to experts. Tensors and files only."""

from .arithmetic import all_finite, graft_tensor, low_rank_weight
from .post_training import PostTrainingDelta
from .report import DeltaReport, FamilyDelta
from .scale import Scale, scale_of_groups
from .vocabulary import VocabularyMap

__all__ = [
    "DeltaReport",
    "FamilyDelta",
    "PostTrainingDelta",
    "Scale",
    "VocabularyMap",
    "all_finite",
    "graft_tensor",
    "low_rank_weight",
    "scale_of_groups",
]
