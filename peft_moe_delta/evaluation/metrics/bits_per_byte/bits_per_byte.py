"""Bits per byte of texts, from the log-likelihoods a model gave them."""

import math

import datasets
import evaluate

from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation.bootstrap import bootstrap_interval

_DESCRIPTION = "How many bits a language model needs for a byte of text: comparable across languages and tokenizers."
_INPUTS = """
Args:
    predictions: the natural-log likelihood of each text, a negative number: the sum over its tokens.
    references: the texts.
Returns:
    bits_per_byte: total bits over total UTF-8 bytes. low, high: 95% bootstrap interval over texts.
Examples:
    >>> metric.compute(predictions=[-6.931471805599453], references=["abcd"])["bits_per_byte"]
    2.5
"""


class BitsPerByte(evaluate.Metric):
    """`- sum log-likelihood / ln 2 / sum bytes`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float]:
        sizes = [len(text.encode()) for text in references]
        if not all(sizes):
            raise DataError(f"references[{sizes.index(0)}]: got an empty text, expected at least one byte. Drop it.")
        bits = [-likelihood / math.log(2) for likelihood in predictions]
        value, low, high = bootstrap_interval(bits, sizes)
        return {"bits_per_byte": value, "low": low, "high": high}
