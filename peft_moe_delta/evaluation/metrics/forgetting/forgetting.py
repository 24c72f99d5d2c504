"""Forgetting: how much of what a model could do before a change it can no longer do after it."""

import datasets
import evaluate

from peft_moe_delta.evaluation.bootstrap import paired_difference

_DESCRIPTION = "The loss of score on the same items from a model before a change to the model after it."
_INPUTS = """
Args:
    predictions: the score of each item after the change.
    references: the score of the same item before it.
    higher_is_better: which way is up; false for bits per byte.
Returns:
    forgetting: mean score lost, positive when the model got worse. low, high: 95% paired bootstrap interval over items.
Examples:
    >>> metric.compute(predictions=[1.0, 0.0, 0.0, 1.0], references=[1.0, 1.0, 1.0, 1.0])["forgetting"]
    0.5
"""


class Forgetting(evaluate.Metric):
    """`mean(before - after)`, its sign turned where lower is better."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[float], higher_is_better: bool = True
    ) -> dict[str, float]:
        before, after = (references, predictions) if higher_is_better else (predictions, references)
        value, low, high = paired_difference(before, after)
        return {"forgetting": value, "low": low, "high": high}
