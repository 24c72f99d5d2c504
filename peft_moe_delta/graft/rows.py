"""Embedding rows of two models matched by token string, not by number.

In: token -> id of the base and the post-trained tokenizer, and embeddings `(rows, ...)` of both. Out: the base's
embedding in the post-trained model's rows, over which `graft_tensor` holds as for any other weight (DeltaMoE, arXiv
2605.18083, with rules of ours):

    shared token                                W_0 of its row there     the graft adds scale * Delta
    token of the post-trained model alone       P of its row here        Delta 0: its row verbatim at every scale
    the post-trained model's special token      P of its row here        Delta 0, even where the base knows it
    row beyond both tokenizers (padding)        W_0 of the same row      the graft adds scale * Delta

A token whose id is beyond its model's rows (Gemma 3's image token in a text model) has no row, so the model does not
know it. Tokens learnt in expansion stand after the post-trained model's own, in their order, verbatim
(`tensors.with_new_rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, GraftError
from ..loading import load_tokenizer
from ..tensors import Tensors, is_embedding
from ..tuner.config import MoeDeltaConfig

MIN_SHARED = 0.9
"""Share of the base's tokens that its post-trained sibling must know: below, it has another tokenizer."""


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Where the rows of the post-trained model's embeddings come from.

    Attributes:
        base_row: int64, (post-trained rows,): the row of the base model; -1 where the post-trained row is verbatim.
        next_id: the first id that no token of the post-trained model has; tokens learnt in expansion start there.
    """

    base_row: Tensor
    next_id: int

    @classmethod
    def match(
        cls,
        base: Mapping[str, int],
        post_trained: Mapping[str, int],
        *,
        special: Collection[str],
        base_rows: int,
        post_trained_rows: int,
    ) -> VocabularyMap:
        """Match by token string.

        Args:
            base, post_trained: token -> id, as `tokenizer.get_vocab()` gives them.
            special: tokens whose post-trained rows are verbatim: chat markers, end of text, ...
            base_rows, post_trained_rows: rows of the embeddings, padding included.

        Raises:
            GraftError: a special token has no row in the post-trained model (and had none in the base), or the
                post-trained model has no row for more than a tenth of the base's tokens.
        """
        next_id = max(post_trained.values(), default=-1) + 1
        unused = {token for token, row in base.items() if row >= base_rows}
        missing = sorted(t for t in special if not 0 <= post_trained.get(t, -1) < post_trained_rows and t not in unused)
        if missing:
            raise GraftError(
                f"The special tokens {missing[:3]} of the post-trained model have no row in its embeddings of "
                f"{post_trained_rows} rows. Its tokenizer and its weights do not belong together: fetch both again."
            )
        ours = {token: row for token, row in base.items() if row < base_rows}
        theirs = {token: row for token, row in post_trained.items() if row < post_trained_rows}
        known = len(ours.keys() & theirs.keys())
        if known < MIN_SHARED * len(base):
            raise GraftError(
                f"The tokenizers differ: {known} of the base's {len(base)} tokens have a row both in the base's "
                f"{base_rows} and in the post-trained model's {post_trained_rows}. A delta exists only between models "
                "of one tokenizer, each with its own; added and renumbered tokens are fine."
            )
        padding = {*ours.values(), *theirs.values()}
        base_row = torch.tensor(
            [row if row < base_rows and row not in padding else -1 for row in range(post_trained_rows)]
        )
        shared = [(row, ours[token]) for token, row in theirs.items() if token in ours and token not in special]
        if shared:
            targets, sources = torch.tensor(shared).unbind(1)
            base_row[targets] = sources
        return cls(base_row, next_id)

    @classmethod
    def same(cls, rows: int, next_id: int | None = None) -> VocabularyMap:
        """Row r is row r: two models of one vocabulary.

        Args:
            rows: of both embeddings.
            next_id: the first id without a token; `rows` where the tokenizer is not known.
        """
        return cls(torch.arange(rows), rows if next_id is None else next_id)

    @property
    def is_same(self) -> bool:
        """Whether every row keeps its place, up to rows that the base has beyond."""
        return torch.equal(self.base_row, torch.arange(len(self.base_row)))

    def align(self, base: Tensor, post_trained: Tensor) -> Tensor:
        """The base's embedding in the post-trained model's rows; `post_trained`'s own rows where they are verbatim.

        Args:
            base: (base rows, ...).
            post_trained: (post-trained rows, ...).

        Returns:
            (post-trained rows, ...) in the base's dtype, or a wider one where that would round a verbatim row; `base`
            itself where nothing moves.

        Raises:
            GraftError: another number of rows than the map's.
        """
        if len(post_trained) != len(self.base_row) or int(self.base_row.max()) >= len(base):
            raise GraftError(
                f"Embeddings of {len(base)} and {len(post_trained)} rows do not fit a map from "
                f"{int(self.base_row.max()) + 1} or more rows to {len(self.base_row)}. Match the vocabularies again."
            )
        if self.is_same and len(base) == len(post_trained):
            return base
        source = self.base_row.to(base.device)
        verbatim = (source < 0).view(-1, *[1] * (base.dim() - 1))
        return torch.where(verbatim, post_trained.to(base.device), base[source.clamp(min=0)])


@dataclass(frozen=True)
class AlignedWeights(Tensors):
    """A base model's weights, embeddings in the post-trained model's rows; made one tensor at a time.

    Attributes:
        base, post_trained: weights by name, read lazily if they are checkpoints.
        vocabulary: how rows belong together.
    """

    base: Tensors
    post_trained: Tensors
    vocabulary: VocabularyMap

    def __getitem__(self, name: str) -> Tensor:
        base = self.base[name]
        if not self._moves(name):
            return base
        return self.vocabulary.align(base, self.post_trained[name])

    def meta(self, name: str) -> Tensor:
        like = self.base.meta(name)
        return like.new_empty(self.post_trained.meta(name).shape) if self._moves(name) else like

    def sample(self, name: str) -> Tensor:
        return super().sample(name) if self._moves(name) else self.base.sample(name)

    def _moves(self, name: str) -> bool:
        return is_embedding(name) and name in self.post_trained

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base


def match_tokenizers(
    base: str, post_trained: str, *, base_rows: int, post_trained_rows: int, new_tokens: Collection[str] = ()
) -> VocabularyMap | None:
    """How the embedding rows of two checkpoints belong together; None where one of them has no tokenizer beside it.

    Args:
        base, post_trained: folders or Hub ids.
        base_rows, post_trained_rows: rows of their embeddings (`num_rows`).
        new_tokens: tokens learnt in expansion.

    Raises:
        GraftError: see `VocabularyMap.match`; or the post-trained model has one of `new_tokens` of its own.
    """
    ours, theirs = _tokenizer(base), _tokenizer(post_trained)
    if ours is None or theirs is None:
        return None
    vocabulary = theirs.get_vocab()
    double = [token for token in new_tokens if token in vocabulary]
    if double:
        raise GraftError(
            f"The post-trained model has {len(double)} tokens of its own that were learnt in expansion too, such as "
            f"{double[0]!r}, and only one row can serve each. Expand without them."
        )
    added = {str(token) for token in theirs.added_tokens_decoder.values() if token.special}
    return VocabularyMap.match(
        ours.get_vocab(),
        vocabulary,
        special=added | set(theirs.all_special_tokens),
        base_rows=base_rows,
        post_trained_rows=post_trained_rows,
    )


def first_new_id(config: MoeDeltaConfig, vocabulary: VocabularyMap | None) -> int | None:
    """Id of an adapter's first new token over the post-trained model: behind that model's own; None without any.

    Args:
        config: the adapter's.
        vocabulary: from `match_tokenizers`; None leaves the ids as they are.
    """
    record = config.record
    return vocabulary.next_id if record.new_tokens and vocabulary is not None else record.first_new_token_id


def num_rows(weights: Tensors) -> int:
    """Rows of the embeddings among a model's tensors.

    Raises:
        GraftError: there is none.
    """
    name = next(filter(is_embedding, weights), None)
    if name is None:
        raise GraftError("The checkpoint has no embeddings under a known name. Pass a causal language model.")
    return len(weights.meta(name))


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint; None where there is none."""
    if not name or (Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file()):
        return None
    try:
        return load_tokenizer(name)
    except CheckpointError:
        if Path(name).is_dir():
            raise
        return None  # a model that was made in memory, under a name of its own
