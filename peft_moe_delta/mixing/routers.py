"""`fit_routers`: routers in closed form (DUME, arXiv 2603.29765), from labelled text and without a gradient step.

In: an upcycled model and text of each language. Out: router weights. With x a router's input, y the one-hot group of
its token's language, and every language weighing the same however much text it has:

    A = sum_l mean_{t in l} x_t x_t^T        b_g = sum_{l in g} mean_{t in l} x_t
    W = (A + r tr(A)/D I)^-1 b               each column scaled to unit norm, divided by the temperature

Text runs under routing by its own language while the sums are taken, so they do not depend on the routers there were,
and a language that joins later only adds to them. Sums are fp64.

Shape legend: T tokens, D hidden size, G language groups, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoint import CheckpointReader, write_safetensors
from ..errors import CheckpointError, DataError, LanguageError
from ..routing import routing_named
from ..tuner import MoeDeltaLayer, MoeDeltaModel

FORMAT = "peft-moe-delta router statistics"


@dataclass
class RouterStatistics:
    """What closed-form routers are made of, for every router of a model.

    Attributes:
        A: module name -> (D, D), fp64.
        b: module name -> group -> (D,), fp64.
        languages: the languages they were taken from, in order.
    """

    A: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)

    def add(self, language: str, group: str, sums: Mapping[str, tuple[Tensor, Tensor]], tokens: int) -> None:
        """Add a language: for every router `sum x x^T` and `sum x` over its tokens."""
        for name, (outer, total) in sums.items():
            self.A[name] = self.A.get(name, torch.zeros_like(outer)) + outer / tokens
            columns = self.b.setdefault(name, {})
            columns[group] = columns.get(group, torch.zeros_like(total)) + total / tokens
        self.languages.append(language)

    def solve(self, name: str, sets: Mapping[str, Iterable[str]], ridge: float) -> dict[str, Tensor]:
        """Unit-norm columns of `(A + ridge tr(A)/D I)^-1 b`.

        Args:
            name: the router's module name.
            sets: column -> groups whose tokens belong to it.
            ridge: relative to the mean of A's diagonal.
        """
        A, b, nothing = self.A[name], self.b[name], torch.zeros_like(self.A[name][0])
        targets = torch.stack([sum((b.get(g, nothing) for g in groups), nothing) for groups in sets.values()], dim=1)
        damped = A + ridge * A.trace() / len(A) * torch.eye(len(A), dtype=A.dtype, device=A.device)
        columns = nn.functional.normalize(torch.linalg.solve(damped, targets), dim=0)
        return dict(zip(sets, columns.T, strict=True))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {f"{name}.A": A for name, A in self.A.items()}
        tensors |= {f"{name}.b.{group}": v for name, columns in self.b.items() for group, v in columns.items()}
        write_safetensors(path, tensors, {FORMAT: json.dumps({"languages": self.languages})})

    @classmethod
    def load(cls, path: str | Path) -> RouterStatistics:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or something else.
        """
        reader = CheckpointReader(path)
        if FORMAT not in reader.metadata:
            raise CheckpointError(f"{path} holds no router statistics: its header has no {FORMAT!r}.")
        read = cls(languages=json.loads(reader.metadata[FORMAT])["languages"])
        for key in reader:
            if key.endswith(".A"):
                read.A[key.removesuffix(".A")] = reader[key]
            else:
                name, _, group = key.rpartition(".b.")
                read.b.setdefault(name, {})[group] = reader[key]
        return read


def fit_routers(
    model: PeftModel,
    texts_by_language: Mapping[str, Iterable[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    statistics: RouterStatistics | None = None,
    ridge: float = 1e-2,
    temperature: float = 0.1,
    max_length: int = 512,
    batch_size: int = 8,
    progress: Callable[[Iterable[str]], Iterable[str]] | None = None,
) -> RouterStatistics:
    """Set every router of the active adapter in closed form. A few megabytes of text are plenty.

    The temperature is folded into the weights (rows of norm 1 / temperature), so that nothing else changes: the model
    routes, trains, saves and exports as with any other router. Experts of one group get the same row, and share its
    tokens evenly.

    Args:
        model: the upcycled model; its routing need not be `"learned"` yet.
        texts_by_language: language code -> documents, streamed. Every group needs a language in here or in
            `statistics`; where the config names no language of `"original"`, expert 0's logit is 0, and it serves the
            tokens that no language claims. Use training text: what you evaluate on must not be in it.
        tokenizer: None loads the one beside the base model.
        statistics: those of an earlier fit, to which the languages of this one are added, in place.
        ridge: strength of the regularisation, relative to the mean of A's diagonal.
        temperature: of the softmax.
        max_length: tokens of a document that are used.
        batch_size: documents in one pass.
        progress: wraps each language's documents, e.g. `tqdm.tqdm`.

    Returns:
        The statistics, for `save` and for a later fit.

    Raises:
        LanguageError: an unknown language, one that is in `statistics` already, or a group without any.
        DataError: a language without text, no tokenizer, or a bad number.
    """
    tuner: Any = model.base_model
    table = tuner.active_config.language_table
    fitted = RouterStatistics() if statistics is None else statistics
    _check(tuner, texts_by_language, fitted, ridge, temperature)
    tokenizer = tokenizer or _tokenizer_of(tuner.model)
    with _routed_by_language(tuner):
        for code, texts in texts_by_language.items():
            with _sums(tuner) as sums:
                tokens = 0
                for batch in _batches(progress(texts) if progress else texts, tokenizer, max_length, batch_size):
                    tokens += int(batch["attention_mask"].sum())
                    device = next(tuner.model.parameters()).device
                    tuner.model(**{k: v.to(device) for k, v in batch.items()}, language=code, use_cache=False)
            if not tokens:
                raise DataError(f"There is no text of {code!r}. Give at least one document with one token.")
            fitted.add(code, table.groups[table.group_of[table.id_of(code)]], sums, tokens)
    _set_routers(tuner, fitted, ridge, temperature)
    return fitted


def _check(
    tuner: MoeDeltaModel, texts: Mapping[str, object], fitted: RouterStatistics, ridge: float, temperature: float
) -> None:
    """Refuse what would end in a router that knows nothing of some group."""
    if not temperature > 0 or not ridge > 0:
        raise DataError(f"temperature and ridge must be positive; got {temperature} and {ridge}.")
    table = tuner.active_config.language_table
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


def _tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path)
        return tokenizer
    except (OSError, ValueError) as error:
        raise DataError(f"No tokenizer beside the base model {model.name_or_path!r}: {error}. Pass one.") from error


@contextmanager
def _routed_by_language(tuner: MoeDeltaModel) -> Iterator[None]:
    """Evaluation under routing by language, without gradients; everything as before afterwards.

    Routers are zero meanwhile: a group's experts share its tokens evenly, as they will after the fit.
    """
    config, training = tuner.active_config, [module for module in tuner.model.modules() if module.training]
    routing, config.routing = config.routing, "language"
    weights = [(weight, weight.clone()) for _, weight in _routers(tuner)]
    tuner.model.eval()
    try:
        with torch.no_grad():
            for weight, _ in weights:
                weight.zero_()
            yield
    finally:
        config.routing = routing
        for weight, before in weights:
            weight.copy_(before)
        for module in training:
            module.training = True


def _routers(tuner: MoeDeltaModel) -> Iterator[tuple[str, Tensor]]:
    """Module name and weight of every router, those of groups that were added later included."""
    for _, name, module in tuner.expert_layers():
        for weight in module.router(tuner.active_adapters[0]).parameters():
            yield name, weight.detach()


@contextmanager
def _sums(tuner: MoeDeltaModel) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """`sum x x^T` and `sum x` of what enters each router's layer within the block, padding left out."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(module, MoeDeltaLayer)
            x = args[0] if args else kwargs["hidden_states"]
            x_TD = x.reshape(-1, x.shape[-1])
            mask_T = module.context.state(len(x_TD), training=False).mask_T
            x_TD = (x_TD if mask_T is None else x_TD[mask_T]).double()
            outer, total = sums.get(name, (0.0, 0.0))
            sums[name] = (outer + x_TD.T @ x_TD, total + x_TD.sum(dim=0))

        return hook

    handles = [
        module.register_forward_pre_hook(add(name), with_kwargs=True) for _, name, module in tuner.expert_layers()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _batches(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches; documents without a token are left out."""
    rows: list[list[int]] = []
    for text in texts:
        if ids := list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"]):
            rows.append(ids)
        if len(rows) == batch_size:
            yield _pad(rows)
            rows = []
    if rows:
        yield _pad(rows)


def _pad(rows: list[list[int]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)  # any token will do for padding: it is masked
    ids[mask.bool()] = torch.tensor([token for row in rows for token in row])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _set_routers(tuner: MoeDeltaModel, fitted: RouterStatistics, ridge: float, temperature: float) -> None:
    """Every expert gets the column of the groups that routing by language sends to it."""
    adapter = tuner.active_adapters[0]
    rule = routing_named("language")
    tuner.active_config.open_steps = tuner.active_config.newest_step  # groups that were added may serve from now on
    for _, name, module in tuner.expert_layers():
        settings = module.settings[adapter]
        users: dict[int, tuple[str, ...]] = {}
        for group, allowed in zip(settings.table.groups, rule.allowed_experts(settings.counts), strict=True):
            for expert in (e for e, may in enumerate(allowed) if may):
                users[expert] = (*users.get(expert, ()), group)
        columns = fitted.solve(name, {str(groups): groups for groups in users.values()}, ridge)
        rows = [row for weight in module.router(adapter).parameters() for row in weight]
        for expert, groups in users.items():
            rows[expert].copy_(columns[str(groups)] / temperature)
