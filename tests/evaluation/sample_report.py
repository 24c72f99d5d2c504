"""A small report with a row of every kind, made by hand."""

from __future__ import annotations

from peft_moe_delta.evaluation.report import (
    Agreement,
    Difference,
    EvalReport,
    Fertility,
    Generation,
    Model,
    Routing,
    Score,
    TokenView,
    Transfer,
)

STATUS = {"en": "original", "hu": "expanded"}
VALUES = {"base": (1.0, 2.5, 0.0), "post-trained": (1.1, 2.25, 0.8), "ours": (1.1, 1.75, 0.75)}


def sample_report() -> EvalReport:
    scores, differences = [], []
    for model, (en, hu, task) in VALUES.items():
        for language, value in (("en", en), ("hu", hu)):
            row = {"task": "held-out text", "metric": "bits_per_byte", "language": language}
            row |= {"status": STATUS[language], "higher_is_better": False}
            scores.append(Score(model=model, value=value, low=value - 0.1, high=value + 0.1, items=40, **row))
            if model == "ours":
                change = value - VALUES["post-trained"][("en", "hu").index(language)]
                bounds = {"low": change - 0.05, "high": change + 0.05}
                differences.append(Difference(model=model, reference="post-trained", value=change, **bounds, **row))
        row = {"task": "sorting", "metric": "exact_match", "language": "en", "status": "original"}
        scores.append(Score(model=model, value=task, low=task, high=task, items=100, **row))
    routed = {"layers": [0, 1], "experts": ["0", "hungarian 1"]}
    probabilities = [[[0.9, 0.1], [0.25, 0.75]], [[0.5, 0.5], [0.0, 1.0]]]
    shares, whose = [[0.5, 0.5], [0.25, 0.75]], {"model": "ours", "language": "hu"}
    return EvalReport(
        models=[Model(name=name, source=f"folder/{name}", parameters=1000) for name in VALUES],
        languages=dict(STATUS),
        references=["post-trained", "base"],
        scores=scores,
        differences=differences,
        routing=[Routing(shares=shares, entropy=[0.9, 0.4], tokens=20, **whose, **routed)],
        agreement=[Agreement(reference="adapter", layers=[0, 1], shares=[1.0, 0.9], **whose)],
        tokens=[TokenView(tokens=["küld", "és"], probabilities=probabilities, **whose, **routed)],
        generations=[Generation(language="hu", prompt="Írj <b>", answers={"base": "The", "ours": "Egy"})],
        transfer=[Transfer(model="ours", reference="base", trained="hu", tested="en", gain=-0.1, low=-0.2, high=0.0)],
        fertility=[Fertility(model="base", language="hu", tokens_per_word=3.1, bytes_per_token=2.2)],
        warnings=["One seed."],
        command=["peft-moe-delta", "evaluate"],
        versions={"torch": "2.13.0"},
    )
