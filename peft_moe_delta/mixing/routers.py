"""`fit_routers`: routers in closed form (DUME, arXiv 2603.29765), from labelled text and without a gradient step.

In: an upcycled model and text of each language. Out: router weights. With x a router's input, y the one-hot group of
its token's language, and every language weighing the same however much text it has:

    A = sum_l mean_{t in l} x_t x_t^T        b_g = sum_{l in g} mean_{t in l} x_t
    W = (A + r tr(A)/D I)^-1 b               each column scaled to unit norm, divided by the temperature

Text runs under routing by its own language while the sums are taken, so they do not depend on the routers there were,
and a language that joins later only adds to them. Sums are fp64.

After `add_languages`, the new experts' rows can be fitted alone, beside earlier ones as they stand, of whatever scale:
against these a new expert e has probability `sigmoid(w_e x - o(x))`, with `o = logsumexp` of their logits, and least
squares puts its argument at a margin m, above 0 for its own group's tokens and below for all others:

    c = sum_l mean_{t in l} x_t o(x_t)       w_e = (A + r tr(A)/D I)^-1 (c + m (b_g - sum_{h != g} b_h))

There an earlier language weighs more than a new one, in A, b and c: between languages that no linear row can tell
apart, it is the new one that gives way.

Gates (`"classifier"` routing) are the linear discriminant of the original languages, of mean u, from the others, of
mean v: with C the covariance, `w = (C + r tr(C)/D I)^-1 (u - v)`, and 0 half-way between the means.

Shape legend: T tokens, D hidden size, G language groups, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..documents import check_languages, each_document
from ..errors import DataError, LanguageError
from ..export.gate import evaluating
from ..languages import ORIGINAL_GROUP
from ..loading import tokenizer_of
from ..padding import padded
from ..routing import routing_named
from ..tuner import MoeDeltaLayer, MoeDeltaTuner
from ..tuner.processes import check_whole
from .statistics import RouterStatistics

EARLIER_WEIGHT = 2.0
"""Of a language, beside 1 for those of the newest growth step."""


def fit_routers(
    model: PeftModel,
    texts_by_language: Mapping[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    only: str | None = None,
    statistics: RouterStatistics | None = None,
    ridge: float = 1e-2,
    temperature: float = 0.1,
    margin: float = 5.0,
    earlier_weight: float = EARLIER_WEIGHT,
    max_length: int = 512,
    batch_size: int = 8,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> RouterStatistics:
    """Set every router and gate of the active adapter in closed form. A few megabytes of text are plenty.

    The temperature is folded into the weights (rows of norm 1 / temperature), so that nothing else changes: the model
    routes, trains, saves and exports as with any other router. Experts of one group get the same row, and share its
    tokens evenly.

    Args:
        model: the upcycled model; its routing need not be `"learned"` yet.
        texts_by_language: language code -> documents, streamed. Every group needs a language in here or in
            `statistics`; where the config names no language of `"original"`, expert 0's logit is 0, and it serves the
            tokens that no language claims. Use training text: what you evaluate on must not be in it.
        tokenizer: None loads the one beside the base model.
        only: None sets everything. `"newest"`, for an adapter that has grown, sets what its newest step brought, rows
            and gates: a review that starts there has little left to learn. `"gates"` leaves all routers alone.
        statistics: those of an earlier fit, to which the languages of this one are added, in place.
        ridge: strength of the regularisation, relative to the mean of A's diagonal.
        temperature: of the softmax.
        margin: with `only="newest"`, how far above or below the earlier experts' logits a new one's are put.
        earlier_weight: with `only="newest"`, how many times as much an earlier language weighs as one of the newest
            step. At 1 the routers err as often on either side; more costs the new languages some of their gain.
        max_length: tokens of a document that are used.
        batch_size: documents in one pass.
        progress: wraps each language's documents, e.g. `tqdm.tqdm`.

    Returns:
        The statistics, for `save` and for a later fit.

    Raises:
        LanguageError: an unknown language, one that is in `statistics` already, or a group without any.
        DataError: a language without text, no tokenizer, a bad number, or `only="newest"` with `statistics`.
        PeftMoeDeltaError: a model that is sharded over processes.
    """
    tuner: Any = model.base_model
    check_whole(tuner, "fit_routers")
    table = tuner.active_config.language_table
    if only not in (None, "newest", "gates") or (only == "newest" and statistics is not None):
        raise DataError(
            f'`only` must be None, "newest" or "gates", and "newest" goes without `statistics`, which do not hold the '
            f"logits that new rows are fitted beside: give text of every group. Got {only!r}."
        )
    fitted = RouterStatistics() if statistics is None else statistics
    weighted = RouterStatistics()  # for the newest rows alone: gates, and the caller, get every language alike
    numbers = {"ridge": ridge, "temperature": temperature, "margin": margin, "earlier_weight": earlier_weight}
    _check(tuner, texts_by_language, fitted, numbers)
    newest = tuner.active_config.newest_step
    beside = only == "newest" and newest > 0
    offsets: dict[str, Tensor] = {}
    tokenizer = tokenizer or tokenizer_of(tuner.model)
    with _routed_by_language(tuner, zeroed=not beside and only != "gates"):
        for code, texts in texts_by_language.items():
            documents = each_document(progress(texts) if progress else texts, f"texts_by_language[{code!r}]")
            sums, tokens = _sums_of(tuner, code, _encoded(documents, tokenizer, max_length), batch_size, beside)
            group = table.group_of[table.id_of(code)]
            moments = {name: found[:2] for name, found in sums.items()}
            fitted.add(code, table.groups[group], moments, tokens)
            if beside:
                weight = earlier_weight if tuner.active_config.steps[group] < newest else 1.0
                weighted.add(code, table.groups[group], moments, tokens / weight)
                for name, (_, _, offset) in sums.items():
                    offsets[name] = offsets.get(name, 0.0) + offset * weight / tokens
    if only != "gates":
        tuner.active_config.change(open_steps=tuner.active_config.newest_step)  # what was added may serve from now on
    if beside:
        _set_newest_rows(tuner, weighted, offsets, margin, ridge)
    elif only != "gates":
        _set_routers(tuner, fitted, ridge, temperature)
    _set_gates(tuner, fitted, beside, ridge)
    return fitted


def statistics_of(
    model: PeftModel, rows_by_source: Iterable[tuple[str, Sequence[Sequence[int]]]], batch_size: int = 8
) -> RouterStatistics:
    """The statistics of rows of token ids, each source of them with its language and of the same weight."""
    tuner: Any = model.base_model
    table, found = tuner.active_config.language_table, RouterStatistics()
    with _routed_by_language(tuner, zeroed=True):
        for code, rows in rows_by_source:
            sums, tokens = _sums_of(tuner, code, rows, batch_size)
            moments = {name: parts[:2] for name, parts in sums.items()}
            found.add(code, table.groups[table.group_of[table.id_of(code)]], moments, tokens)
    return found


def set_routers(
    model: PeftModel,
    original: RouterStatistics,
    others: RouterStatistics,
    weight: float,
    *,
    ridge: float = 1e-2,
    temperature: float = 0.1,
) -> None:
    """Set every router and gate where an error on a token of an original language weighs so much beside another's.

    Rows keep their sizes beside one another, other than in `fit_routers`: scaled to one norm each, they would lose most
    of what the weight gives.
    """
    tuner: Any = model.base_model
    _set_routers(tuner, others.joined(original, weight), ridge, temperature, together=True)
    _set_gates(tuner, others.joined(original), False, ridge, weight)


def _check(
    tuner: MoeDeltaTuner, texts: Mapping[str, Iterable[str]], fitted: RouterStatistics, numbers: Mapping[str, float]
) -> None:
    """Refuse numbers that cannot be, and what `check_groups` does."""
    if not min(numbers.values()) > 0:
        raise DataError(f"{', '.join(numbers)} must be positive; got {', '.join(map(str, numbers.values()))}.")
    check_groups(tuner, texts, fitted)


def check_groups(tuner: MoeDeltaTuner, texts: Mapping[str, Iterable[str]], fitted: RouterStatistics) -> None:
    """Refuse what would end in a router that knows nothing of some group."""
    table = tuner.active_config.language_table
    check_languages(texts, "texts_by_language")
    for code in (*fitted.languages, *texts):
        table.id_of(code)
    twice = set(fitted.languages) & set(texts)
    if twice:
        raise LanguageError(f"The statistics hold {sorted(twice)} already. Fit only the languages that join.")
    present = {*fitted.languages, *texts}
    missing = {g: table.members(g) for g in table.groups if table.members(g) and not present & set(table.members(g))}
    if missing:
        raise LanguageError(
            f"No text stands for the groups {list(missing)}, so no token would ever be sent to their experts. Add text "
            f"of one of their languages: {'; '.join(', '.join(codes) for codes in missing.values())}."
        )


@contextmanager
def _routed_by_language(tuner: MoeDeltaTuner, zeroed: bool) -> Iterator[None]:
    """Evaluation under routing by language, without gradients; everything as before afterwards.

    Where all routers are going to be set, they are zero meanwhile: a group's experts share its tokens evenly, as they
    will after the fit.
    """
    weights = [(weight, weight.clone()) for _, weight in _routers(tuner)]
    try:
        with evaluating(tuner.model), torch.no_grad(), tuner.in_routing("language"):
            for weight, _ in weights if zeroed else ():
                weight.zero_()
            yield
    finally:
        for weight, before in weights:
            weight.copy_(before)


def _routers(tuner: MoeDeltaTuner) -> Iterator[tuple[str, Tensor]]:
    """Module name and weight of every router, those of groups that were added later included."""
    for _, name, module in tuner.expert_layers():
        for weight in module.router(tuner.active_adapters[0]).parameters():
            yield name, weight.detach()


@contextmanager
def _sums(tuner: MoeDeltaTuner, beside: bool) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Sums over what enters each router's layer within the block, padding left out.

    `x x^T`, `x`, and `x o(x)` with o the logsumexp of the earlier rows' logits, where the newest are set beside them.
    """
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    adapter = tuner.active_adapters[0]

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(module, MoeDeltaLayer)
            x = args[0] if args else kwargs["hidden_states"]
            x_TD = x.reshape(-1, x.shape[-1])
            mask_T = module.context.state(len(x_TD), training=False).mask_T
            x_TD = x_TD if mask_T is None else x_TD[mask_T.to(x_TD.device)]
            offset_T = x_TD.new_zeros(len(x_TD))
            if beside:
                offset_T = module.router(adapter)(x_TD)[:, : _earlier_rows(module, adapter)].logsumexp(dim=-1)
            x_TD = x_TD.double()
            found = x_TD.T @ x_TD, x_TD.sum(dim=0), offset_T.double() @ x_TD
            before = sums.get(name, (0.0, 0.0, 0.0))
            sums[name] = (before[0] + found[0], before[1] + found[1], before[2] + found[2])

        return hook

    handles = [
        module.register_forward_pre_hook(add(name), with_kwargs=True) for _, name, module in tuner.expert_layers()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _sums_of(
    tuner: MoeDeltaTuner, code: str, rows: Iterable[Sequence[int]], batch_size: int, beside: bool = False
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], int]:
    """Every router's sums over rows of token ids in one language, and how many tokens they are.

    Raises:
        DataError: there is none.
    """
    model, device, tokens = tuner.model, next(tuner.model.parameters()).device, 0
    waiting = iter(rows)
    with _sums(tuner, beside) as sums:
        while batch := list(islice(waiting, batch_size)):
            ids, mask = padded(batch)
            tokens += int(mask.sum())
            model(input_ids=ids.to(device), attention_mask=mask.to(device), language=code, use_cache=False)
    if not tokens:
        raise DataError(f"There is no text of {code!r}. Give at least one document with one token.")
    return sums, tokens


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[list[int]]:
    """The documents' ids; those without a token are left out."""
    for text in texts:
        if ids := list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"]):
            yield ids


@torch.no_grad()
def _set_routers(
    tuner: MoeDeltaTuner, fitted: RouterStatistics, ridge: float, temperature: float, together: bool = False
) -> None:
    """Every expert gets the column of the groups that routing by language sends to it."""
    for name, rows, users in _rows_and_users(tuner):
        columns = fitted.solve(name, {str(groups): groups for groups in users.values()}, ridge, together)
        for expert, groups in users.items():
            rows[expert].copy_(columns[str(groups)] / temperature)


@torch.no_grad()
def _set_newest_rows(
    tuner: MoeDeltaTuner, fitted: RouterStatistics, offsets: Mapping[str, Tensor], margin: float, ridge: float
) -> None:
    """The experts of the newest growth step get rows that stand a margin above or below the earlier experts' logits."""
    earlier = {name: _earlier_rows(module, tuner.active_adapters[0]) for _, name, module in tuner.expert_layers()}
    for name, rows, users in _rows_and_users(tuner):
        for expert, groups in users.items():
            if expert >= earlier[name]:
                rows[expert].copy_(fitted.solve_beside(name, groups, offsets[name], margin, ridge))


@torch.no_grad()
def _set_gates(tuner: MoeDeltaTuner, fitted: RouterStatistics, newest: bool, ridge: float, odds: float = 1.0) -> None:
    """The row of every growth step that has experts in the layer tells its languages from the original ones."""
    adapter, config = tuner.active_adapters[0], tuner.active_config
    table = config.language_table
    known = {g: sum(code in table.members(g) for code in fitted.languages) for g in table.groups}
    for _, name, module in tuner.expert_layers():
        gate = module.classifier(adapter)
        if gate is None or not known[ORIGINAL_GROUP]:
            continue
        counts = module.settings[adapter].counts
        for step, rows in enumerate(gate.parameters()):
            own = [g for g, s, n in zip(table.groups, config.steps, counts, strict=True) if s == step and n]
            others = {g: known[g] for g in own if g != ORIGINAL_GROUP and known[g]}
            if others and (step == config.newest_step or not newest):
                rows[0].copy_(fitted.discriminant(name, {ORIGINAL_GROUP: known[ORIGINAL_GROUP]}, others, ridge, odds))


def _rows_and_users(tuner: MoeDeltaTuner) -> Iterator[tuple[str, list[Tensor], dict[int, tuple[str, ...]]]]:
    """Of every router its module name, its rows, and by expert the groups that routing by language sends to it."""
    adapter, rule = tuner.active_adapters[0], routing_named("language")
    for _, name, module in tuner.expert_layers():
        settings = module.settings[adapter]
        users: dict[int, tuple[str, ...]] = {}
        for group, allowed in zip(settings.tables.languages.groups, rule.allowed_experts(settings.counts), strict=True):
            for expert in (e for e, may in enumerate(allowed) if may):
                users[expert] = (*users.get(expert, ()), group)
        yield name, [row for weight in module.router(adapter).parameters() for row in weight], users


def _earlier_rows(module: MoeDeltaLayer, adapter: str) -> int:
    """How many of a router's rows were there before the newest growth step."""
    settings = module.settings[adapter]
    return sum(not settings.tables.trained_groups[group] for group in settings.tables.owners)
