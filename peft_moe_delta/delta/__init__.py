"""Post-training deltas: what instruction tuning changed, and how it is added to experts. Tensors and files only."""

from .arithmetic import graft_tensor, low_rank_weight
from .post_training import PostTrainingDelta
from .report import DeltaReport, FamilyDelta
from .scale import Scale, scale_of_groups
from .stored import DeltaFile, combine_deltas
from .vocabulary import VocabularyMap

__all__ = [
    "DeltaFile",
    "DeltaReport",
    "FamilyDelta",
    "PostTrainingDelta",
    "Scale",
    "VocabularyMap",
    "combine_deltas",
    "graft_tensor",
    "low_rank_weight",
    "scale_of_groups",
]
