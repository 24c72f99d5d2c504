"""Metrics for `evaluate.load`, each a folder with a script and its card.

    evaluate.load(str(peft_moe_delta.evaluation.metrics.path("language_confusion")))

loads one from the installed package, offline. `evaluate` copies a script away and reads its imports line by line, so
each script imports one name a line, and from the package by its full name.
"""

from pathlib import Path

NAMES = ("bits_per_byte", "forgetting", "language_confusion")


def path(name: str) -> Path:
    """The folder of a metric, for `evaluate.load`."""
    return Path(__file__).parent / name
