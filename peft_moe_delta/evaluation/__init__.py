"""Measuring a model language by language: held-out text, tasks with exact answers, and how sure the numbers are."""

from .bits_per_byte import TextScore, bits_per_byte
from .bootstrap import Interval, bootstrap_interval, paired_difference
from .confusion import ConfusionScore, language_confusion
from .exact_match import TaskScore, encode_task, exact_match
from .fertility import Fertility, fertility
from .groups import closest_group, score_groups
from .measure import evaluate_languages
from .report import EvalReport
from .scoring import TaskSet

__all__ = [
    "ConfusionScore",
    "EvalReport",
    "Fertility",
    "Interval",
    "TaskScore",
    "TaskSet",
    "TextScore",
    "bits_per_byte",
    "bootstrap_interval",
    "closest_group",
    "encode_task",
    "evaluate_languages",
    "exact_match",
    "fertility",
    "language_confusion",
    "paired_difference",
    "score_groups",
]
