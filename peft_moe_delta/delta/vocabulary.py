"""Embedding rows of two models matched by token string, not by number.

In: token -> id of the base and the post-trained tokenizer, and embeddings `(rows, ...)` of both. Out: the base's
embedding in the post-trained model's rows, over which `graft_tensor` holds as for any other weight (DeltaMoE, arXiv
2605.18083, with rules of ours):

    shared token                                W_0 of its row there     the graft adds scale * Delta
    token of the post-trained model alone       P of its row here        Delta 0: its row verbatim at every scale
    the post-trained model's special token      P of its row here        Delta 0, even where the base knows it
    row beyond both tokenizers (padding)        W_0 of the same row      the graft adds scale * Delta

Tokens learnt in expansion stand after the post-trained model's own, in their order, verbatim (`with_new_rows`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GraftError
from .arithmetic import rounded

MIN_SHARED = 0.9
"""Share of the base's tokens that its post-trained sibling must know: below, it has another tokenizer."""

_EMBEDDING = re.compile(r"(?:embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)\.(?:weight|bias)$")


def is_embedding(name: str) -> bool:
    """Whether a tensor has one row a token: an input or output embedding."""
    return _EMBEDDING.search(name) is not None


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
            GraftError: a special token has no row in the post-trained model, a token of the base has none in the base,
                or the post-trained model lacks more than a tenth of the base's tokens.
        """
        missing = sorted(t for t in special if not 0 <= post_trained.get(t, -1) < post_trained_rows)
        if missing:
            raise GraftError(
                f"The special tokens {missing[:3]} of the post-trained model have no row in its embeddings of "
                f"{post_trained_rows} rows. Its tokenizer and its weights do not belong together: fetch both again."
            )
        for owner, vocabulary, rows in (("base", base, base_rows), ("post-trained", post_trained, post_trained_rows)):
            highest = max(vocabulary.values(), default=-1)
            if highest >= rows:
                raise GraftError(
                    f"The {owner} tokenizer goes up to id {highest}, its model's embeddings have {rows} rows. They do "
                    "not belong together: fetch both again, or resize_token_embeddings where tokens were added."
                )
        known = sum(token in post_trained for token in base)
        if known < MIN_SHARED * len(base):
            raise GraftError(
                f"The tokenizers differ: the post-trained model knows {known} of the base's {len(base)} tokens. A "
                "delta exists only between models of one tokenizer; added and renumbered tokens are fine."
            )
        own = set(post_trained.values())
        padding = own | set(base.values())
        base_row = torch.tensor(
            [row if row < base_rows and row not in padding else -1 for row in range(post_trained_rows)]
        )
        shared = [(row, base[token]) for token, row in post_trained.items() if token in base and token not in special]
        if shared:
            targets, sources = torch.tensor(shared).unbind(1)
            base_row[targets] = sources
        return cls(base_row, max(own, default=-1) + 1)

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
class AlignedWeights(Mapping[str, Tensor]):
    """A base model's weights, embeddings in the post-trained model's rows; made one tensor at a time.

    Attributes:
        base, post_trained: weights by name, read lazily if they are checkpoints.
        vocabulary: how rows belong together.
    """

    base: Mapping[str, Tensor]
    post_trained: Mapping[str, Tensor]
    vocabulary: VocabularyMap

    def __getitem__(self, name: str) -> Tensor:
        base = self.base[name]
        if not is_embedding(name) or name not in self.post_trained:
            return base
        return self.vocabulary.align(base, self.post_trained[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base


def with_new_rows(embedding: Tensor, new: Tensor, first: int) -> Tensor:
    """An embedding with rows for new tokens, in place of its padding first and then beyond its end.

    Args:
        embedding: (rows, ...).
        new: (tokens, ...), taken in the embedding's dtype.
        first: id of the first new token; at most `rows`.

    Raises:
        GraftError: there would be a gap, the rows are of another width, or too large for the dtype.
    """
    if first > len(embedding) or embedding.shape[1:] != new.shape[1:]:
        raise GraftError(
            f"Cannot put rows of shape {tuple(new.shape)} at {first} into an embedding of shape "
            f"{tuple(embedding.shape)}. They were learnt for another model."
        )
    new = rounded(new.to(embedding.device), embedding.dtype, "The rows of new tokens")
    return torch.cat([embedding[:first], new, embedding[first + len(new) :]])
