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

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..documents import each_document
from ..errors import DataError, LanguageError
from ..evaluation.forward import batches_by_length, evaluating
from ..languages import ORIGINAL_GROUP
from ..loading import tokenizer_of
from ..mixing.routers import check_groups, set_routers, statistics_of
from ..mixing.statistics import RouterStatistics
from ..model import MoeDeltaModel
from ..padding import beginning_of_prompt, padded
from ..routing import routing_named
from ..tuner.processes import check_whole
from ..tuner.recording import recording
from .conversations import made_up_conversations, turn_of_user
from .report import CHAT, TEXT, Calibration, Routed, Trial

WEIGHTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""What is tried as the weight of original tokens."""

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class _Source:
    language: str
    kind: str
    original: bool
    fitted: Rows
    held_out: Sequence[tuple[Sequence[int], int]]
    """Rows, and where in each the answer begins."""
    begun: int
    """Tokens that a row begins with and that are none of its own."""


def calibrate_routers(
    model: PeftModel,
    texts_by_language: Mapping[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    conversations: Sequence[str] | int = 200,
    weights: Sequence[float] = WEIGHTS,
    steps: int = 100,
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
        weights: of an error on an original token, to choose from.
        steps: of the review; 0 leaves it out.
        learning_rate: of the review.
        held_out: share of each source that is held back to choose by.
        max_length: tokens of a document that are used.
        batch_size: documents in one pass.
        seed: of all that is drawn.
        progress: wraps the list of what is tried, and those of conversations' batches, e.g. `tqdm.tqdm`.

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
    if not weights or not min(weights) > 0 or steps < 0 or not 0 < held_out < 1:
        raise DataError(
            f"weights: got {list(weights)}, expected numbers above 0; steps: got {steps}, expected 0 or more; "
            f"held_out: got {held_out}, expected a share between 0 and 1."
        )
    tokenizer = tokenizer or tokenizer_of(tuner.model)
    if isinstance(conversations, int):
        options: dict[str, Any] = {"seed": seed, "batch_size": 2 * batch_size, "progress": progress}
        conversations = made_up_conversations(model, tokenizer, conversations, **options) if conversations else []
    sources = _sources(tuner, texts_by_language, conversations, tokenizer, held_out, max_length, seed)

    def look(name: str, weight: float) -> _Candidate:
        rows = tuple(_routed(tuner, source, batch_size) for source in sources)
        return _Candidate(name, weight, rows, [parameter.detach().clone() for parameter in _routers(tuner)])

    candidates = [look("before", 1.0)]
    groups = list(tuner.active_config.language_table.groups)
    tuner.start_review(language_prior_coef=1.0, language_prior_groups=groups, train_earlier_rows=True)
    original, others = (
        statistics_of(model, [(s.language, s.fitted) for s in sources if s.original is side], batch_size)
        for side in (True, False)
    )
    for weight in progress(list(weights)) if progress else weights:
        set_routers(model, original, others, weight)
        candidates.append(look("closed form", weight))
    curve = tuple(candidate.trial for candidate in candidates[1:])
    best = min(candidates[1:], key=lambda candidate: candidate.trial.cost)
    if steps:
        best.fill(tuner)
        _review(tuner, sources, best.weight, steps, learning_rate, batch_size, seed)
        candidates.append(look("review", best.weight))
    kept = min(candidates, key=lambda candidate: candidate.trial.cost)
    kept.fill(tuner)
    found = Calibration(kept.name, best.weight, curve, candidates[0].rows, kept.rows, len(conversations), steps)
    _note(tuner, found)
    return found


@dataclass(frozen=True)
class _Candidate:
    """Routers that were tried, and how text fared under them."""

    name: str
    weight: float
    rows: tuple[Routed, ...]
    weights: list[Tensor]

    @property
    def trial(self) -> Trial:
        """In five numbers; a side without sources costs nothing."""
        sides = [[row for row in self.rows if row.original is original] for original in (True, False)]
        right = [fmean(row.right for row in side) if side else 1.0 for side in sides]
        cost = [fmean(row.cost for row in side) if side else 0.0 for side in sides]
        answers = min(row.answers for row in self.rows)
        return Trial(self.weight, right[0], right[1], cost[0], cost[1], answers)

    @torch.no_grad()
    def fill(self, tuner: MoeDeltaModel) -> None:
        """Give the model these routers."""
        for parameter, weight in zip(_routers(tuner), self.weights, strict=True):
            parameter.copy_(weight)


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
) -> list[_Source]:
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
        sources.append(_Source(code, kind, group == ORIGINAL_GROUP, fitted, rows[:back], len(bos)))
    return sources


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between question and answer; nothing where no template says it, and all counts as the answer."""
    try:
        return turn_of_user(tokenizer)[1]
    except DataError:
        return ""


def _routers(tuner: MoeDeltaModel) -> Iterator[torch.nn.Parameter]:
    """What is calibrated."""
    for _, _, layer in tuner.expert_layers():
        yield from layer.router(tuner.active_adapters[0]).parameters()
        gate = layer.classifier(tuner.active_adapters[0])
        yield from () if gate is None else gate.parameters()


def _routed(tuner: MoeDeltaModel, source: _Source, batch_size: int) -> Routed:
    """A source's held-out rows under the routers there are, beside routing by language."""
    adapter, table = tuner.active_adapters[0], tuner.active_config.language_table
    group, rule = table.group_of[table.id_of(source.language)], routing_named("language")
    counts = {index: layer.settings[adapter].counts for index, layer in tuner.layers().items()}
    own = {index: torch.tensor(rule.allowed_experts(count)[group]) for index, count in counts.items()}
    rows, right, sums, targets = source.held_out, list[Tensor](), torch.zeros(4, dtype=torch.float64), 0
    with evaluating(tuner.model):
        for batch in batches_by_length([len(row) for row, _ in rows], batch_size):
            ids, mask = padded([rows[index][0] for index in batch])
            with tuner.in_routing("language"):
                told = _logits(tuner, ids, mask, source.language)
            with recording(tuner.model) as recorded:
                free = _logits(tuner, ids, mask, source.language)
            chosen = {index: passes[0].indices_TK[:, 0].cpu() for index, passes in recorded.items()}
            mask[:, : source.begun] = 0
            right += [own[index][first_T][mask.view(-1).bool()] for index, first_T in chosen.items()]
            for free_SV, told_SV, index in zip(free, told, batch, strict=True):  # a batch in fp32 is large
                sums += _compared(free_SV, told_SV, *rows[index])
                targets += len(rows[index][0]) - 1
    loss, alone, divergence = (sums[:3] / max(targets, 1)).tolist()
    return Routed(
        language=source.language,
        kind=source.kind,
        original=source.original,
        right=torch.cat(right).double().mean().item(),
        loss=loss,
        told=alone,
        divergence=divergence,
        answers=sums[3].item() / len(rows),
    )


def _logits(tuner: MoeDeltaModel, ids: Tensor, mask: Tensor, language: str) -> Tensor:
    model: Any = tuner.model
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, language=language, use_cache=False).logits
    return logits


def _compared(free_SV: Tensor, told_SV: Tensor, row: Sequence[int], answer: int) -> Tensor:
    """Of one row, summed over its tokens: loss, loss under routing by language, divergence of the former from that; and
    1 where its answer stays as it is, as far as it was written greedily."""
    free_SV, told_SV = (logits[: len(row) - 1].float().log_softmax(-1) for logits in (free_SV, told_SV))
    targets_S = torch.tensor(row[1:], device=free_SV.device)
    losses = [F.nll_loss(log_probabilities, targets_S, reduction="sum") for log_probabilities in (free_SV, told_SV)]
    divergence = F.kl_div(free_SV, told_SV, log_target=True, reduction="sum")
    lost_S = (told_SV.argmax(-1) == targets_S) & (free_SV.argmax(-1) != targets_S)
    stays = ~lost_S[max(answer - 1, 0) :].any()
    return torch.stack([*losses, divergence, stays.to(divergence)]).double().cpu()


def _review(
    tuner: MoeDeltaModel,
    sources: Sequence[_Source],
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
    parameters = [parameter for parameter in _routers(tuner) if parameter.requires_grad]
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
