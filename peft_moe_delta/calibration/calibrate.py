"""`calibrate_routers`: routers for the model that a graft has made, where they see one token in one layer at a time.

In: a grafted adapter under learned or classifier routing, raw text of its languages, and conversations. Out: routers
and gates set anew, nothing else; and a `Calibration`, which says what that changed on text held back from it.

A router has no delta. It was fitted to the base model's hidden states and to raw text; the grafted model has other
states, and is spoken to in a chat template. So it is fitted again, to the grafted model's states, on text and on
conversations that the post-trained model makes up itself (Magpie, arXiv 2406.08464), which are original text:

1. In closed form, as `fit_routers` does it, where an error on a token of an original language weighs w times as much as
   another's: one token in the wrong expert can spoil an answer, whereas a new language loses a little of its gain on
   each of its tokens.
2. A short review by gradient from there: next token and language prior, in which original sources give w times as many
   tokens.

Each is kept only where it is better than what there was, by one criterion on held-out text, `Trial.cost`: what routing
costs beside routing by language in nats per token, the mean over original sources plus the mean over new languages, and
the share of answers that are lost. (A source is a language's text, or the conversations.) An original source costs what
predictions move from the post-trained model's own (Kullback-Leibler), and not its loss: a model that was tuned far from
raw text predicts it better with experts it should not have used. Text of a new language costs what it is predicted
worse. An answer, which was written greedily, is lost where one of its tokens would no longer be written.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..documents import each_document
from ..errors import DataError, LanguageError
from ..languages import ORIGINAL_GROUP
from ..loading import tokenizer_of
from ..mixing.routers import check_groups, set_routers, statistics_of
from ..mixing.statistics import RouterStatistics
from ..model import MoeDeltaModel
from ..padding import beginning_of_prompt, padded
from ..tuner.processes import check_whole
from .conversations import made_up_conversations, turn_of_user
from .report import CHAT, TEXT, Calibration
from .trials import Routers, Source, Tried, router_parameters, try_out

WEIGHTS = (0.25, 1.0, 4.0, 16.0, 64.0)
"""What is tried first as the weight of original tokens; then come half and double the best one."""


def calibrate_routers(
    model: PeftModel,
    texts_by_language: Mapping[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    conversations: Sequence[str] | int = 200,
    weights: Sequence[float] = WEIGHTS,
    steps: int = 100,
    answer_cost: float = 1.0,
    learning_rate: float = 2e-2,
    held_out: float = 0.25,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[list[Any]], Iterable[Any]] | None = None,
) -> Calibration:
    """Fit the routers and gates of a grafted adapter to the model that it is part of now. Nothing else changes.

    Then `to_stock(model)` is the stand-alone model, and `model.save_pretrained` the adapter.

    Args:
        model: what `model.graft(post_trained)` returned, under `"learned"` or `"classifier"` routing.
        texts_by_language: language code -> training documents; of every group at least one language. A few hundred
            each are plenty.
        tokenizer: the post-trained model's; None loads the one beside it.
        conversations: how many the post-trained model is to make up, or conversations with the chat template applied,
            your own or of `made_up_conversations`; `[]` for none, which leaves chat to chance.
        weights: of an error on an original token, to choose from; half and double the best one are tried as well.
        steps: of the review; 0 leaves it out.
        answer_cost: what the loss of all answers counts as, in nats per token; with less, routers that change some of
            them are kept for what they gain in the new languages.
        learning_rate: of the review.
        held_out: share of each source that is held back to choose by.
        max_length: tokens of a document that are used.
        batch_size: documents in one pass.
        seed: of all that is drawn.
        progress: wraps lists of batches, those of conversations and those of held-out text, e.g. `tqdm.tqdm`.

    Raises:
        LanguageError: an unknown language, a group without text, or conversations where no language is original.
        DataError: a language with fewer than two documents, no tokenizer or chat template, or a bad number.
        PeftMoeDeltaError: a model that is sharded over processes.
    """
    tuner = cast("MoeDeltaModel", model.base_model)
    check_whole(tuner, "calibrate_routers")
    if tuner.active_config.routing_rule.needs_language:
        raise LanguageError(
            f"Under routing {tuner.active_config.routing!r} no router is asked, so there is nothing to calibrate. It "
            'holds as it is; for routers that choose, call start_review(routing="learned") before the graft.'
        )
    if not weights or not min(weights) > 0 or steps < 0 or not 0 < held_out < 1 or not 0 <= answer_cost < math.inf:
        raise DataError(
            f"weights: got {list(weights)}, expected numbers above 0; steps: got {steps}, expected 0 or more; "
            f"held_out: got {held_out}, expected a share between 0 and 1; answer_cost: got {answer_cost}, expected at "
            "least 0."
        )
    tokenizer = tokenizer or tokenizer_of(tuner.model)
    if isinstance(conversations, int):
        options: dict[str, Any] = {"seed": seed, "batch_size": 2 * batch_size, "progress": progress}
        conversations = made_up_conversations(model, tokenizer, conversations, **options) if conversations else []
    sources = _sources(tuner, texts_by_language, conversations, tokenizer, held_out, max_length, seed)

    before = Routers.of(tuner, "before", 1.0)
    groups = list(tuner.active_config.language_table.groups)
    tuner.start_review(language_prior_coef=1.0, language_prior_groups=groups, train_earlier_rows=True)

    def look(routers: list[Routers]) -> list[Tried]:
        return try_out(tuner, sources, routers, batch_size, progress) if routers else []

    def cost(tried: Tried) -> float:
        return tried.trial.cost(answer_cost)

    earlier, *closed = _closed_forms(model, sources, before, weights, batch_size, look, cost)
    best = min(closed, key=cost)
    candidates = [earlier, *closed]
    if steps:
        best.routers.fill(tuner)
        _review(tuner, sources, best.routers.weight, steps, learning_rate, batch_size, seed)
        candidates += look([Routers.of(tuner, "review", best.routers.weight)])
    kept = min(candidates, key=cost)
    kept.routers.fill(tuner)
    curve = tuple(sorted((one.trial for one in closed), key=lambda trial: trial.weight))
    found = Calibration(
        kept.routers.name, best.routers.weight, curve, earlier.rows, kept.rows, len(conversations), steps, answer_cost
    )
    _note(tuner, found)
    return found


def _closed_forms(
    model: PeftModel,
    sources: Sequence[Source],
    before: Routers,
    weights: Sequence[float],
    batch_size: int,
    look: Callable[[list[Routers]], list[Tried]],
    cost: Callable[[Tried], float],
) -> list[Tried]:
    """The routers that there were, and the closed form under every weight, and under half and double the best one."""
    tuner = cast("MoeDeltaModel", model.base_model)
    original, others = (
        statistics_of(model, [(s.language, s.fitted) for s in sources if s.original is side], batch_size)
        for side in (True, False)
    )

    def closed_form(weight: float) -> Routers:
        set_routers(model, original, others, weight)
        return Routers.of(tuner, "closed form", weight)

    found = look([before, *map(closed_form, weights)])
    best = min(found[1:], key=cost).routers.weight
    return found + look([closed_form(weight) for weight in (best / 2, best * 2) if weight not in weights])


def _note(tuner: MoeDeltaModel, found: Calibration) -> None:
    """Beside what the graft says of itself, in the adapter's config: an export reports it as well."""
    graft = tuner.active_config.record.graft
    if graft is not None:
        said = {**graft, "calibration": {**asdict(found), "doubts": list(found.doubts)}}
        tuner.active_config.change(graft=said)


def _sources(
    tuner: MoeDeltaModel,
    texts: Mapping[str, Iterable[str]],
    conversations: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    held_out: float,
    max_length: int,
    seed: int,
) -> list[Source]:
    """Every language's text, and the conversations, as rows of ids; a share of each is held back."""
    check_groups(tuner, texts, RouterStatistics())
    table = tuner.active_config.language_table
    groups = {code: table.groups[table.group_of[table.id_of(code)]] for code in texts}
    originals = table.members(ORIGINAL_GROUP)
    if conversations and not originals:
        raise LanguageError(
            "Conversations are text of an original language, and the adapter names none. Pass conversations=[], or "
            'name one in its config: languages={"en": "original", ...}.'
        )
    end = _end_of_turn(tokenizer)
    named = [(code, TEXT, groups[code], documents) for code, documents in texts.items()]
    if conversations:
        named.append((originals[0], CHAT, ORIGINAL_GROUP, conversations))
    sources = []
    for code, kind, group, documents in named:
        bos = beginning_of_prompt(tokenizer) if kind == TEXT else []  # a template brings its own beginning
        name = f"texts_by_language[{code!r}]" if kind == TEXT else "conversations"
        options: dict[str, Any] = {"add_special_tokens": False, "truncation": True, "max_length": max_length}
        rows: list[tuple[list[int], int]] = []  # and where the answer begins, behind the end of a text
        for text in each_document(documents, name):
            asked, turn, answer = text.rpartition(end) if kind == CHAT and end else ("", "", text)
            head, tail = (list(tokenizer(part, **options)["input_ids"]) for part in (asked + turn, answer))
            if row := [*bos, *head, *tail][:max_length]:
                rows.append((row, len(head) if kind == CHAT else len(row)))
        if len(rows) < 2:
            raise DataError(
                f"The {kind} of {code!r}: got {len(rows)} documents with a token, expected at least 2, one to fit on "
                "and one to hold back. Give more."
            )
        random.Random(seed).shuffle(rows)
        back = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        fitted = [row for row, _ in rows[back:]]
        sources.append(Source(code, kind, group == ORIGINAL_GROUP, fitted, rows[:back], len(bos)))
    return sources


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between question and answer; nothing where no template says it, and all counts as the answer."""
    try:
        return turn_of_user(tokenizer)[1]
    except DataError:
        return ""


def _review(
    tuner: MoeDeltaModel,
    sources: Sequence[Source],
    weight: float,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> None:
    """Steps of AdamW on routers and gates alone, with a linear decay.

    Sources give as many tokens as each other, however long their rows are, and original ones `weight` times as many.
    """
    model, drawn = tuner.model, random.Random(seed)
    training = [module for module in model.modules() if not module.training]
    parameters = [parameter for parameter in router_parameters(tuner) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    chances = [(weight if s.original else 1.0) / fmean(len(row) for row in s.fitted) for s in sources]
    device = next(model.parameters()).device
    try:
        model.train()
        for _ in range(steps):
            picked = drawn.choices(sources, chances, k=batch_size)
            ids, mask = (part.to(device) for part in padded([drawn.choice(source.fitted) for source in picked]))
            languages = [source.language for source in picked]
            labels = ids.masked_fill(mask == 0, -100)
            model(
                input_ids=ids, attention_mask=mask, labels=labels, language=languages, use_cache=False
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    finally:
        for module in training:
            module.training = False
