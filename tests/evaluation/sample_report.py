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
COLUMNS = (
    {"task": "held-out text", "metric": "bits_per_byte", "language": "en", "higher_is_better": False},
    {"task": "held-out text", "metric": "bits_per_byte", "language": "hu", "higher_is_better": False},
    {"task": "sorting", "metric": "exact_match", "language": "en"},
)
SPREADS = (0.005, 0.05, 0.03)
PAIRS = (("ours", "post-trained"), ("base", "post-trained"), ("ours", "base"))


def sample_report() -> EvalReport:
    scores, differences = [], []
    for model, values in VALUES.items():
        for column, value in zip(COLUMNS, values, strict=True):
            spread, items = (0.0, 100) if column["task"] == "sorting" else (0.1, 40)
            bounds = {"low": value - spread, "high": value + spread}
            row = {"model": model, "status": STATUS[column["language"]], "items": items, "value": value}
            scores.append(Score(**row, **bounds, **column))
    for pair in PAIRS:
        for column, value, other, spread in zip(COLUMNS, *(VALUES[name] for name in pair), SPREADS, strict=True):
            row = {"model": pair[0], "reference": pair[1], "status": STATUS[column["language"]], "value": value - other}
            differences.append(Difference(low=row["value"] - spread, high=row["value"] + spread, **row, **column))
    routed = {"layers": [0, 1], "experts": ["expert 0", "hungarian"]}
    probabilities = [[[0.9, 0.1], [0.25, 0.75]], [[0.5, 0.5], [0.0, 1.0]]]
    shares, whose = [[0.5, 0.5], [0.25, 0.75]], {"model": "ours", "language": "hu"}
    english = {**whose, "language": "en"}
    return EvalReport(
        models=[
            Model(name=name, source=f"folder/{name}", parameters=1000, about=f"the model {name}", measured="2026-11-30")
            for name in VALUES
        ],
        own=["ours"],
        languages=dict(STATUS),
        references=["post-trained", "base"],
        scores=scores,
        differences=differences,
        routing=[
            Routing(shares=shares, entropy=[0.9, 0.4], tokens=20, **whose, **routed),
            Routing(shares=[[1.0, 0.0]] * 2, entropy=[0.1, 0.2], tokens=20, first_on_0=0.994, **english, **routed),
        ],
        agreement=[Agreement(reference="adapter", layers=[0, 1], shares=[1.0, 0.9], **whose)],
        tokens=[TokenView(tokens=["küld", "és"], probabilities=probabilities, **whose, **routed)],
        generations=[Generation(language="hu", prompt="Írj <b>", answers={"base": "The", "ours": "Egy"})],
        transfer=[Transfer(model="ours", reference="base", trained="hu", tested="en", gain=-0.1, low=-0.2, high=0.0)],
        fertility=[Fertility(model="base", language="hu", tokens_per_word=3.1, bytes_per_token=2.2)],
        warnings=["One seed."],
        command=["peft-moe-delta", "evaluate"],
        versions={"torch": "2.13.0"},
    )
