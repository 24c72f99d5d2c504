"""Language confusion of responses, given the language each should be in."""

import datasets
import evaluate

from peft_moe_delta.evaluation.confusion import language_confusion

_DESCRIPTION = "Whether responses are in the language they were asked in: line pass rate and word pass rate."
_CITATION = "arXiv:2406.20052"
_INPUTS = """
Args:
    predictions: responses.
    english: English words for the word pass rate; without them those of Webster's second edition.
    references: for each the code of the language it should be in, such as "hu" or "pt-BR".
Returns:
    {code}: line_pass_rate, word_pass_rate (None in languages of Latin script; called word_pass_rate_web2 without
    `english`) and counted responses, for each language.
Examples:
    >>> metric.compute(predictions=["This is an English sentence."], references=["hu"])["hu"]["line_pass_rate"]
    0.0
"""


class LanguageConfusion(evaluate.Metric):
    """By language, never as one average."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], english: list[str] | None = None
    ) -> dict[str, dict[str, float | None]]:
        responses: dict[str, list[str]] = {}
        for response, language in zip(predictions, references, strict=True):
            responses.setdefault(language, []).append(response)
        results = {}
        for language, texts in responses.items():
            score = language_confusion(texts, language, english=english)
            results[language] = {
                "line_pass_rate": score.line_pass_rate,
                score.word_metric: score.word_pass_rate,
                "counted": float(score.counted.sum()),
            }
        return results
