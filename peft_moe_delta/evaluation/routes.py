"""Which experts a model's tokens go to: by language and layer, token by token, and beside another model of its plan.

In: an adapter of this package or an export of one, and texts. Out: rows of a report. A model without routers
gives none.

Shape legend: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..documents import check_documents
from ..languages import closest_code
from ..padding import beginning
from ..routing import Routes
from ..tuner import MoeDeltaLayer
from ..tuner.agreement import same_experts
from ..tuner.recording import recording, routed_layers
from .forward import batches_by_length, evaluating, logits_at, most_tokens
from .loading import Measured
from .report import Agreement, Routing, Status, TokenView

AGREE = 0.9
"""Share of tokens that keep their experts below which a graft's routes are said to drift. Grafts that lose nothing
keep 97% and more; one that lost its whole skill kept 48% of its English tokens."""

STRAY = 0.1
"""Further share of an original language's tokens off expert 0 from which on routes are said to drift."""

_LONGEST = 512  # tokens of a text that are looked at
_BATCH = 8


def routing_by_language(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    name: str,
    language: str,
    spoken: str | None = None,
    experts: Sequence[str] | None = None,
) -> Routing | None:
    """Shares and entropy of every layer over the texts' tokens; None for a model without routers.

    Args:
        language: of the texts.
        spoken: the language to name in the call, which adapters that route by language need.
        experts: names of the experts, expert 0 first; None to take them from the adapter, or to number them.
    """
    routes = _routes(model, tokenizer, texts, spoken)
    if not routes:
        return None
    width = max(r.probabilities_TE.shape[1] for r in routes.values())
    shares, entropy = [], []
    for layer in routes.values():
        used = layer.indices_TK[layer.indices_TK < layer.probabilities_TE.shape[1]]
        count = used.bincount(minlength=width).double()
        shares.append((count / count.sum()).tolist())
        entropy.append(torch.special.entr(layer.probabilities_TE.double()).sum(-1).mean().item() / 0.6931471805599453)
    return Routing(
        model=name,
        language=language,
        layers=list(routes),
        experts=_names(experts or _experts_of(model), width),
        shares=shares,
        entropy=entropy,
        tokens=len(next(iter(routes.values())).indices_TK),
        first_on_0=1 - fmean(map(_off_expert_0, routes.values())),
    )


def route_drift(
    before: Measured,
    after: Measured,
    texts: Mapping[str, Sequence[str]],
    *,
    names: tuple[str, str],
    kind: str = "text",
) -> list[Agreement]:
    """What a change of the weights did to a plan's routes, by language: a graft, or 16 bits.

    Args:
        before, after: two models of one plan; texts become `after`'s tokens in both.
        texts: language -> texts.
        names: of `after` and of `before`.
        kind: what the texts are, `"text"` or `"chat"`.

    Returns:
        A row a language; none where the two route no common layer.
    """
    rows = []
    for code, listed in texts.items():
        now = _routes(after.model, after.tokenizer, listed, after.spoken(code))
        then = _routes(before.model, after.tokenizer, listed, before.spoken(code))
        layers = [i for i in now if i in then and now[i].probabilities_TE.shape == then[i].probabilities_TE.shape]
        if layers:
            rows.append(
                Agreement(
                    model=names[0],
                    reference=names[1],
                    language=code,
                    kind=kind,
                    layers=layers,
                    shares=[same_experts(now[i], then[i]).double().mean().item() for i in layers],
                    off=fmean(_off_expert_0(now[i]) for i in layers),
                    reference_off=fmean(_off_expert_0(then[i]) for i in layers),
                    tokens=len(now[layers[0]].indices_TK),
                )
            )
    return rows


def drift_doubts(rows: Iterable[Agreement], statuses: Mapping[str, Status]) -> list[str]:
    """Where routes drift so far that what the experts learnt may not be reached, and what to do about it: one sentence
    for two models, which names the languages."""
    drifted: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if _drifts(row, statuses):
            drifted.setdefault((row.reference, row.model), []).append(
                f"{fmean(row.shares):.0%} of {row.language!r} tokens ({row.kind}) keep their experts and {row.off:.0%} "
                f"instead of {row.reference_off:.0%} leave expert 0"
            )
    return [
        f"Routes drift: from {reference!r} to {model!r} {'; '.join(found)}. What the experts learnt may not be "
        "reached: calibrate the routers on the grafted model (calibrate_routers), or route by language or by context."
        for (reference, model), found in drifted.items()
    ]


def _drifts(row: Agreement, statuses: Mapping[str, Status]) -> bool:
    """Whether a language's routes moved. Where original tokens are on expert 0, the post-trained model itself runs,
    wherever they were before."""
    original = status_of_row(row, statuses) == "original"
    moved = fmean(row.shares) < AGREE and not (original and row.off <= STRAY)
    return moved or (original and row.off - row.reference_off > STRAY)


def status_of_row(row: Agreement, statuses: Mapping[str, Status]) -> Status | None:
    """What the language of a row is to the models."""
    code = closest_code(row.language, statuses)
    return None if code is None else statuses[code]


def _off_expert_0(routes: Routes) -> float:
    """Share of tokens whose first expert is another than expert 0."""
    return (routes.indices_TK[:, 0] != 0).double().mean().item()


def token_view(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    language: str,
    spoken: str | None = None,
    experts: Sequence[str] | None = None,
    longest: int = 60,
) -> TokenView | None:
    """Router probabilities of every token of a short text; None for a model without routers."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:longest]
    routes = _routes_of_rows(model, [ids], tokenizer, spoken)
    if not routes:
        return None
    width = max(r.probabilities_TE.shape[1] for r in routes.values())
    return TokenView(
        model=name,
        language=language,
        tokens=_pieces(tokenizer, ids),
        layers=list(routes),
        experts=_names(experts or _experts_of(model), width),
        probabilities=[
            [[round(p, 4) for p in row] + [0.0] * (width - len(row)) for row in layer.probabilities_TE.tolist()]
            for layer in routes.values()
        ],
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, such that joined they are the whole text: bytes of a split character stand with its last
    token, and the tokens before it are empty."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end])))
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        pieces.append(whole[len(before) :])
        before = max(before, whole, key=len)
    return pieces


def _routes(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], language: str | None
) -> dict[int, Routes]:
    longest = min(_LONGEST, most_tokens(model) or _LONGEST) - 1  # a beginning comes before
    documents = check_documents(texts, blank=True)
    rows = tokenizer(documents, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
    return _routes_of_rows(model, [row for row in rows if row], tokenizer, language)


def _routes_of_rows(
    model: nn.Module, rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, language: str | None
) -> dict[int, Routes]:
    """Layer -> routes of all tokens of all rows, on the CPU, in an order that does not depend on the model. Rows begin
    as they do when they are scored; that token is not counted."""
    if not routed_layers(model):
        return {}
    gathered: dict[int, list[Routes]] = {}
    with evaluating(model):
        for batch in batches_by_length([len(row) for row in rows], _BATCH):
            part = [[beginning(tokenizer), *rows[index]] for index in batch]
            with recording(model) as recorded:
                logits_at(model, part, [0], language)
            longest = max(len(row) for row in part)
            place = torch.arange(longest)
            kept = torch.cat([(place > 0) & (place < len(row)) for row in part])
            for index, passes in recorded.items():
                gathered.setdefault(index, []).extend(_kept(routes, kept) for routes in passes)
    return {index: _joined(parts) for index, parts in sorted(gathered.items())}


def _experts_of(model: nn.Module) -> list[str]:
    """Names of an adapter's experts, from the layer that has most; none for an export, which does not know them."""
    names: list[str] = []
    for layer in routed_layers(model).values():
        if not isinstance(layer, MoeDeltaLayer) or layer.in_force is None:
            continue
        settings = layer.settings[layer.in_force]
        if len(names) < sum(settings.counts):
            names = expert_names(settings.tables.languages.groups, settings.counts)
    return names


def _kept(routes: Routes, kept: Tensor) -> Routes:
    kept = kept.to(routes.indices_TK.device)
    parts = [part[kept].cpu() for part in (routes.indices_TK, routes.weights_TK, routes.probabilities_TE)]
    return Routes(parts[0], parts[1], parts[2], routes.normalised)


def _joined(parts: Sequence[Routes]) -> Routes:
    columns = zip(*((p.indices_TK, p.weights_TK, p.probabilities_TE) for p in parts), strict=True)
    indices_TK, weights_TK, probabilities_TE = (torch.cat(column) for column in columns)
    return Routes(indices_TK, weights_TK, probabilities_TE, all(p.normalised for p in parts))


def expert_names(groups: Sequence[str], counts: Sequence[int]) -> list[str]:
    """A name for every expert of a layer in which each group owns so many, expert 0 first."""
    numbered = zip(groups[1:], counts[1:], strict=True)
    own = (f"{group} {n}" if count > 1 else group for group, count in numbered for n in range(1, count + 1))
    return ["expert 0", *own]


def _names(names: Sequence[str], width: int) -> list[str]:
    return [*names, *(f"expert {number}" for number in range(len(names), width))][:width]
