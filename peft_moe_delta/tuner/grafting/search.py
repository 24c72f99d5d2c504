"""How much of the experts' own change to keep: what `expert_scale="auto"` chooses from."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftModel

Validation = Callable[[PeftModel], float]
"""A score of a grafted model on held-out text and tasks; higher is better."""

EXPERT_SCALES = (0.25, 0.5, 0.75, 1.0)
"""What is tried. Between these the score is flat: on the demo the middles beside the best were within its noise."""
