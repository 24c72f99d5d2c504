"""One run: train a method once, turn what may be turned, score every turn. In: a `Run`. Out: a JSON file.

The file has the score of every point `(a, s)` on validation text, by language, and on test text, by document, so that
intervals need no model. It is written whole or not at all, and a run whose file is there is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import ENGLISH, LENGTH
from torch.utils.flop_counter import FlopCounterMode

from peft_moe_delta.evaluation import bits_per_byte, exact_match, language_confusion
from peft_moe_delta.evaluation.generation import generate
from peft_moe_delta.files import write_text

from .curves import area, frontier
from .family import Family
from .material import UNNAMED, HeldOut, Material, Pair, codes_of, digest_of
from .methods import METHODS
from .scores import AXES, LOWEST, means

PROMPTS, BEGINNING, WRITTEN = 12, 60, 32  # of each new language; characters; tokens
Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        pair, method: names.
        steps: of training; 0 where there is nothing to train.
        seed: of the pair, of the order of text and of what is drawn.
        rate: learning rate.
    """

    pair: str
    method: str
    steps: int
    seed: int
    rate: float = 0.0

    def file(self, digest: str) -> str:
        """Of the results: a folder for each pair of models."""
        return f"{self.pair}-{self.seed}-{digest}/{self.method}-{self.steps}.json"

    def family(self, pair: Pair, text: Material) -> Family:
        """Train."""
        torch.manual_seed(self.seed)
        return METHODS[self.method].make(pair, text, self.rate, self.steps, self.seed)


def carry_out(run: Run, pair: Pair, text: Material, folder: Path) -> None:
    """Train, score and write; nothing where the file is there."""
    file = folder / run.file(pair.digest)
    if file.is_file():
        return
    started = time.process_time()
    family = run.family(pair, text)
    trained = time.process_time()
    reference = score(pair.tuned, text, "validation", told=False)
    held = text.held_out["validation"]
    turns = [(share, scale) for scale in family.scales for share in family.shares]
    validation = [score(family.at(*turn), text, "validation", told=family.told) for turn in turns]
    points: list[dict[str, Any]] = [
        {
            "share": share,
            "scale": scale,
            "criterion": round(criterion(one, reference, text), 5),
            "validation": totals(one, held),
        }
        for (share, scale), one in zip(turns, validation, strict=True)
    ]
    chosen = max(range(len(points)), key=lambda index: points[index]["criterion"])
    # Tables need no test of a point that validation keeps off every frontier.
    for index in sorted({chosen, len(points) - 1} | on_frontiers(totals(reference, held), points)):
        model = family.at(*turns[index])
        points[index]["test"] = score(model, text, "test", told=family.told)
        if index == chosen or turns[index] == (1.0, 1.0):
            points[index]["other"] = score(model, text, "other", told=family.told)
    model = family.at(*turns[chosen])
    found = {
        **asdict(run),
        "pair_digest": pair.digest,
        "text_digest": digest_of(text.sizes()),
        "moved": pair.moved,
        "told": family.told,
        "trained": family.trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": {code: flops(model, code, told=family.told) for code in (ENGLISH, text.new[0])},
        "line_pass_rate": confusion(model, text, told=family.told),
        "chosen": chosen,
        "seconds": {"training": round(trained - started, 1), "scoring": round(time.process_time() - trained, 1)},
        "points": points,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, in_lines(found))


def on_frontiers(reference: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> set[int]:
    """Indices of the points that are on a frontier of validation text, as `Results` has it."""
    begins = [reference] if any(point["scale"] == 1.0 for point in points) else []
    before, *each = (means(one) for one in (reference, *begins, *(point["validation"] for point in points)))
    found = {int(i) for axes in AXES for i in frontier(*(np.array([e[n] - before[n] for e in each]) for n in axes))}
    return {index - len(begins) for index in found if index >= len(begins)}


def validate(run: Run, pair: Pair, text: Material) -> dict[str, float]:
    """What a learning rate is chosen by, on validation text alone and at the whole delta, where there is one.

    Returns:
        `reach`, the area under the frontier as tables have it, the mean over its pairs of measures, new languages' text
        as a share of the post-trained model's bits; and the best `criterion`, which decides where `reach` is the same.
    """
    family = run.family(pair, text)
    reference, scale = score(pair.tuned, text, "validation", told=False), family.scales[-1]
    found = [score(family.at(share, scale), text, "validation", told=family.told) for share in family.shares]
    begins = [reference] if scale == 1.0 else []
    held = text.held_out["validation"]
    before, *points = (means(totals(one, held)) for one in (reference, *begins, *found))
    return {
        "reach": round(reach(before, points), 5),
        "criterion": round(max(criterion(one, reference, text) for one in found), 5),
    }


def reach(before: Mapping[str, float], points: Sequence[Mapping[str, float]]) -> float:
    """The mean area under a method's frontiers; 0 for a pair of measures of which the one is never kept."""
    areas = []
    for kept, gained in AXES:
        kept_P, gained_P = (np.array([one[name] - before[name] for one in points]) for name in (kept, gained))
        chosen = frontier(kept_P, gained_P)
        found = float(area(kept_P[None, chosen], gained_P[None, chosen], LOWEST[kept])[0])
        areas.append(0.0 if math.isnan(found) else found / (abs(before["new"]) if gained == "new" else 1.0))
    return statistics.fmean(areas)


def score(model: Any, text: Material, part: str, *, told: bool) -> Scores:
    """`{"bits": {language: bits of each document}, "skill": {language: "0" or "1" for each question}}`.

    `told`: the model is told each text's language, English of one that it does not know.
    """
    held, named = text.held_out[part], language_of(told)
    # Windows overlap: the models have learnt no longer ones, and text is rarely read from a cut.
    windows = {"max_length": LENGTH, "stride": LENGTH // 2, "batch_size": 32}
    bits, skill = {}, {}
    for code, documents in held.texts.items():
        found = bits_per_byte(model, text.tokenizer, documents, **windows, **named(code))
        bits[code] = [round(float(value), 1) for value in found.bits]
    for code, tasks in held.tasks.items():
        right = exact_match(model, text.tokenizer, tasks, **named(code)).correct
        skill[code] = "".join(str(int(value)) for value in right)
    return {"bits": bits, "skill": skill}


def totals(scores: Scores, held: HeldOut) -> dict[str, dict[str, float]]:
    """Bits per byte and share of right answers by language."""
    bits = {c: sum(b) / sum(len(d.encode()) for d in held.texts[c]) for c, b in scores["bits"].items()}
    skill = {code: right.count("1") / len(right) for code, right in scores["skill"].items()}
    return {kind: {c: round(v, 5) for c, v in found.items()} for kind, found in (("bits", bits), ("skill", skill))}


def criterion(scores: Scores, reference: Scores, text: Material) -> float:
    """What everything is chosen by, on validation text: gain in the new languages, less what is lost, as fractions.

    The mean over new languages of `1 - bits / post-trained's bits`, less the share by which English became worse, plus
    the mean over kinds of questions, English and new, of right answers beyond the post-trained model's.
    """
    held = text.held_out["validation"]
    now, before = totals(scores, held), totals(reference, held)
    new = codes_of(now["skill"])
    gain = statistics.fmean(1 - now["bits"][code] / before["bits"][code] for code in new)
    lost = max(0.0, now["bits"][ENGLISH] / before["bits"][ENGLISH] - 1)
    more = {code: now["skill"][code] - before["skill"][code] for code in now["skill"]}
    return gain - lost + (more[ENGLISH] + statistics.fmean(more[code] for code in new)) / 2


def language_of(told: bool) -> Callable[[str], dict[str, str]]:
    return lambda code: {"language": ENGLISH if code == UNNAMED else code} if told else {}


def flops(model: Any, code: str, *, told: bool) -> int:
    """Of one token of a language, forward, as PyTorch counts them; on a row as long as those of training."""
    ids = torch.arange(LENGTH).view(1, -1)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=False, **language_of(told)(code))
    return round(counted.get_total_flops() / LENGTH)


def confusion(model: Any, text: Material, *, told: bool) -> dict[str, float | None]:
    """Line pass rate of continuations of test documents, by new language; None where no line was long enough."""
    rates = {}
    for code in text.new:
        prompts = [document[:BEGINNING] for document in text.held_out["test"].texts[code][:PROMPTS]]
        written = generate(model, text.tokenizer, prompts, max_new_tokens=WRITTEN, **language_of(told)(code))
        rates[code] = language_confusion(written, code).line_pass_rate
    return rates


def in_lines(found: Mapping[str, Any]) -> str:
    """JSON with a line for each field and for each point: small, and a change shows where it is."""
    fields = [f'"{name}": {json.dumps(value)}' for name, value in found.items() if name != "points"]
    points = ",\n".join(json.dumps(one, separators=(",", ":")) for one in found["points"])
    return "{\n" + ",\n".join([*fields, f'"points": [\n{points}\n]']) + "\n}\n"
