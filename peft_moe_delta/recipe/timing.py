"""How long a run's expansion would take on this machine, as a sentence for the end of a dry run."""

from __future__ import annotations

from ..budget import Job
from ..budget.timing import PASSES, seconds_of_a_pass
from .fields import Training

_UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def estimate(job: Job, training: Training) -> str:
    """Time a few passes, and say what all of them take.

    Args:
        job: the training, as the budget measures it.
        training: its steps.
    """
    seconds = seconds_of_a_pass(job)
    passes = training.sequences // training.batch_size
    return (
        f"Timed here: a pass of the expansion took {seconds:.2g} s, the median of {PASSES} on random weights, so its "
        f"{passes:,} take about {in_words(seconds * passes)}. Reading text, other trainings, the graft and scores come "
        "on top."
    )


def in_words(seconds: float) -> str:
    """A length of time in its largest unit of which there are two."""
    size, unit = next(((s, u) for s, u in _UNITS if seconds >= 2 * s), _UNITS[-1])
    return f"{seconds / size:,.1f} {unit}"
