"""Measuring a model language by language: held-out text, tasks with exact answers, and how sure the numbers are."""

from .bits_per_byte import TextScore, bits_per_byte
from .bootstrap import Interval, bootstrap_interval, paired_difference
from .exact_match import TaskScore, encode_task, exact_match
from .fertility import Fertility, fertility
from .groups import closest_group, score_groups

__all__ = [
    "Fertility",
    "Interval",
    "TaskScore",
    "TextScore",
    "bits_per_byte",
    "bootstrap_interval",
    "closest_group",
    "encode_task",
    "exact_match",
    "fertility",
    "paired_difference",
    "score_groups",
]
