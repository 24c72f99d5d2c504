"""Before training: measure a model language by language, group the languages, and give each layer its experts."""

from .allocate import STRATEGIES, allocate_experts
from .group import LanguageGroups, group_languages
from .measure import Measurement, measure_languages
from .pictures import draw_groups, draw_statistics
from .statistics import SOURCES, LanguageStatistics

__all__ = [
    "LanguageGroups",
    "LanguageStatistics",
    "Measurement",
    "SOURCES",
    "STRATEGIES",
    "allocate_experts",
    "draw_groups",
    "draw_statistics",
    "group_languages",
    "measure_languages",
]
