"""Rows of new tokens fitted to a little text, before anything is trained.

In: an upcycled model with new rows, its grown tokenizer, text. Out: the same model, with the output rows R (which are
the input rows, too, where the two are tied) that minimise

    mean_t -log softmax([W h_t, R h_t])[y_t]  +  TETHER * mean_i |R_i - M_i|^2 / mean_j |W_j|^2

h_t is what the output embedding gets at position t, read once with the rows as they are, y_t the next token, W the
known rows, which stay as they are, and M the rows before: distilled ones where the two are tied (`distil`), else the
mean of each new token's pieces. The fit learns how frequent the tokens are and after what; the problem is convex and
needs no gradient through the model. The tether keeps a tied row readable, and a rare token's row near where it was.

Shape legend: T positions, N new tokens, D hidden size, V known tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArchitectureError
from ..export.gate import evaluating
from ..padding import beginning, padded
from ..tuner import MoeDeltaTuner
from ..tuner.vocabulary import grown_layers
from .text import longest, options_for

TETHER = 3.0
"""Weight of the squared distance to the rows before. From means, on Greek, ten times more and a thirtieth did worse."""
STEPS, POSITIONS = 100, 1024
RATE = 0.02
"""Adam's first learning rate as a multiple of the root mean square of a known row's entries; it falls to 0."""
BATCH = 4


class States(NamedTuple):
    """What the output embedding saw: `hidden` (T, D), `known` (T,) log-sum-exp of the known tokens' logits, `targets`
    (T,)."""

    hidden: Tensor
    known: Tensor
    targets: Tensor


def check_can_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, language: str | None) -> None:
    """Refuse what a fit would get wrong, before anything is changed.

    Raises:
        DataError: the tokenizer has no token for a text to begin with.
        ArchitectureError: the model scales or caps its logits.
        LanguageError: routing needs a language and none, or an unknown one, is given.
    """
    found: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: found.append(out))
    try:
        with evaluating(model), torch.no_grad():
            ids = torch.tensor([[beginning(tokenizer)]], device=model.device)
            logits = model(input_ids=ids, **options_for(language)).logits
    finally:
        hook.remove()
    if not torch.equal(logits, found[0].to(logits)):
        raise ArchitectureError(
            f"{type(model).__name__} scales or caps its logits, which a fit of new rows does not know. Leave `texts` "
            "out; the rows then start as the mean of their pieces."
        )


def fit_rows(
    tuner: MoeDeltaTuner,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    language: str | None,
) -> None:
    """Fit the active adapter's new output rows to texts, in place."""
    grown = grown_layers(tuner.model)
    assert grown is not None
    head = grown[1]
    name = tuner.active_adapters[0]
    rows, first = head.rows(name), head.first(name)
    states = _read(tuner.model, head, tokenizer, texts, first, len(rows), language)
    scale = head.base_layer.get_parameter("weight").detach().float().pow(2).mean()
    start = rows.detach().float()
    fitted = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([fitted], lr=RATE * scale.sqrt().item())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), torch.autocast(start.device.type, enabled=False):
        for _ in range(STEPS):
            chosen = torch.randint(len(states.targets), (POSITIONS,), generator=generator).to(start.device)
            distance = (fitted - start).pow(2).mean() / scale
            loss = cross_entropy(fitted, States(*(part[chosen] for part in states)), first) + TETHER * distance
            (fitted.grad,) = torch.autograd.grad(loss, [fitted])
            optimizer.step()
            schedule.step()
    rows.data.copy_(fitted.detach())


def cross_entropy(rows: Tensor, states: States, first: int) -> Tensor:
    """The mean cross-entropy in nats, but for the logits of known targets, which no new row moves."""
    logits = F.linear(states.hidden, rows)
    total = torch.logaddexp(states.known, logits.logsumexp(-1))
    place = states.targets - first
    own = logits.gather(1, place.clamp(min=0)[:, None])[:, 0]
    return (total - torch.where(place >= 0, own, 0.0)).mean()


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    head: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    first: int,
    num_tokens: int,
    language: str | None,
) -> States:
    """One pass over the texts."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    parts: list[States] = []
    try:
        with evaluating(model):
            for ids, mask in _batches(tokenizer, texts, longest(model)):
                ids, mask = ids.to(model.device), mask.to(model.device)
                model(input_ids=ids, attention_mask=mask, use_cache=False, **options_for(language))
                hidden, logits = seen.pop()
                real = mask[:, 1:].bool()
                known = logits[:, :-1][real].float()
                known[:, first : first + num_tokens] = -torch.inf
                parts.append(States(hidden[:, :-1][real].float(), known.logsumexp(-1), ids[:, 1:][real]))
    finally:
        hook.remove()
    return States(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _batches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and attention mask, (BATCH, up to `length`), each row begun as a document is."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    cuts = [ids[at : at + length - 1] for ids in encoded for at in range(0, len(ids), length - 1)]
    rows = sorted(([beginning(tokenizer), *cut] for cut in cuts), key=len)
    for start in range(0, len(rows), BATCH):
        yield padded(rows[start : start + BATCH])
