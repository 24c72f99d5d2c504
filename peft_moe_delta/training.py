"""What the plain Hugging Face `Trainer` needs: batches that know their languages, and the routers' figures in its log.

In: documents with a `language` column of codes. Out: batches with `language_ids`, next-token labels, and, if packed,
positions that keep documents apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .errors import DataError
from .evaluation.identification import wrong_language_or_script
from .export.gate import evaluating
from .languages import PADDING_LANGUAGE_ID, LanguageTable
from .losses import IGNORED_LABEL, share_of_step
from .monitor import TrainingMonitor, active_config, doubt, resumed_state
from .tuner import MoeDeltaConfig, MoeDeltaLayer
from .tuner.context import ForwardContext, Sums

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


LOOKED_AT, LETTERS = 10, 40
"""Documents of each language, of so many letters at the least, whose language is checked."""


@dataclass(frozen=True)
class _Document:
    """One document's tokens, labels and language ids, of equal length."""

    tokens: list[int]
    labels: list[int]
    languages: list[int]


class LanguageCollator:
    """Turns documents into a batch for causal language modelling with languages.

    Each document is a mapping with `input_ids` (or `text`, tokenised here and closed with the end-of-text token), a
    `language` code (or one code a token), and optionally `labels` and an `attention_mask`, whose zeros are left out.

    Returns, all int64 (B, S): `input_ids`, `labels` (-100 where there is no target), `language_ids` (-100 for padding),
    and

    - padded (default): `attention_mask`. Padding is known by its place, not by its token: end-of-text stays a target
      where it doubles as padding. Padded on the left, a document has `position_ids` that begin with it, and its first
      token, which only padding precedes, is no target.
    - packed: documents laid end to end in rows of `max_length`, of which the last is filled up; `position_ids` that
      restart with every document and row, from which most of transformers' models keep documents from attending to
      each other. Falcon, BLOOM and MPT do not; so a packed pass of a few tokens is tried on the model, and a model that
      mixes documents is refused. FlashAttention tells documents apart within one row only, so it gets all rows as one.

    The first ten documents of each language are looked at, and a warning says so if they are in another one.

    Args:
        tokenizer: pads, and tokenises `text`.
        model: the upcycled model, whose active adapter knows the languages; or a `MoeDeltaConfig` or `LanguageTable`.
        max_length: tokens a row; longer documents are cut (padded) or continue on the next row (packed).
        packing: whether to pack.
        pad_to_multiple_of: round the padded length up.

    Raises:
        DataError: a document without tokens or language, an empty batch, packing without `max_length`, or for a model
            whose documents would see each other.
        LanguageError: an unknown language.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: nn.Module | MoeDeltaConfig | LanguageTable,
        *,
        max_length: int | None = None,
        packing: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if packing and max_length is None:
            raise DataError("LanguageCollator(packing=True) needs `max_length`, the tokens a row. Got None.")
        self.tokenizer = tokenizer
        self.table = language_table_of(model)
        self._config = active_config(model) if isinstance(model, nn.Module) else None
        self._looked_at: dict[str, list[str]] = {}
        self.max_length = max_length
        self.packing = packing
        self.pad_to_multiple_of = pad_to_multiple_of
        self._one_row = "flash" in str(_attention_of(model))
        if packing and isinstance(model, nn.Module) and not self._keeps_apart(model):
            raise DataError(
                f"LanguageCollator(packing=True): in this {type(_base_model_of(model)).__name__} with attention "
                f"{_attention_of(model)!r} packed documents attend to each other. Leave packing out: padded documents "
                "are rows of their own."
            )

    def __getstate__(self) -> dict[str, Any]:
        """For another process, in which the adapter's configuration would be a copy."""
        return {**self.__dict__, "_config": None}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not features:
            raise DataError("LanguageCollator got an empty batch; expected at least one document.")
        documents = [self._read(feature) for feature in features]
        return self._pack(documents, self.max_length) if self.packing else self._pad(documents)

    def _read(self, feature: Mapping[str, Any]) -> _Document:
        if feature.get("language") is None:
            raise DataError(
                f"A document has no `language`; its columns are {sorted(feature)}. Add a column of language codes: "
                f"{', '.join(self.table.codes)}. If the data set has one, the trainer dropped it: set "
                "remove_unused_columns=False, and with TRL put AuxiliaryLossMixin before SFTTrainer."
            )
        tokens = self._tokens(feature)
        labels = list(feature["labels"]) if feature.get("labels") is not None else list(tokens)
        language = feature["language"]
        codes = [language] * len(tokens) if isinstance(language, str) else list(language)
        if not tokens or not len(tokens) == len(labels) == len(codes):
            raise DataError(
                f"A document has {len(tokens)} tokens, {len(labels)} labels and {len(codes)} languages; expected at "
                "least one token, and one label and one language for each."
            )
        ids = {code: self.table.id_of(code) for code in dict.fromkeys(codes)}
        if isinstance(language, str):
            self._look_at(language, feature, tokens)
        columns = tokens, [int(label) for label in labels], [ids[code] for code in codes]
        if feature.get("attention_mask") is None:
            return _Document(*columns)
        return _Document(*([v for v, kept in zip(c, feature["attention_mask"], strict=True) if kept] for c in columns))

    def look_through(self, features: Iterable[Mapping[str, Any]]) -> None:
        """Look at the first documents of each language now, in the order given, rather than as batches come.

        A training that is resumed does not see its first batches again; this way it has looked at the same documents.
        """
        for feature in features:
            language = feature.get("language")
            if isinstance(language, str) and len(self._looked_at.get(language, [])) < LOOKED_AT:
                self._look_at(language, feature, self._tokens(feature))

    def _look_at(self, language: str, feature: Mapping[str, Any], tokens: list[int]) -> None:
        """Doubt a training on text in another language than it is said to be in: the first documents tell."""
        documents = self._looked_at.setdefault(language, [])
        if len(documents) == LOOKED_AT:
            return
        given = feature.get("text")
        text = given if isinstance(given, str) else str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if sum(map(str.isalpha, text)) < LETTERS:
            return  # too short to tell
        documents.append(text)
        if len(documents) == LOOKED_AT:
            wrong = wrong_language_or_script(documents, language, f"the training text of {language!r}")
            if wrong is not None:
                doubt(self._config, wrong.removesuffix("."))

    def _tokens(self, feature: Mapping[str, Any]) -> list[int]:
        if feature.get("input_ids") is not None:
            return [int(token) for token in feature["input_ids"]]
        if not isinstance(feature.get("text"), str):
            raise DataError(
                f"A document has neither `input_ids` nor `text`; its columns are {sorted(feature)}. If the trainer "
                "dropped a column, set remove_unused_columns=False."
            )
        tokens = list(self.tokenizer(feature["text"])["input_ids"])
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]

    def _pad(self, documents: list[_Document]) -> dict[str, Tensor]:
        length = max(len(d.tokens) for d in documents)
        if self.max_length is not None:
            length = min(length, self.max_length)
        multiple = self.pad_to_multiple_of or 1
        width = -(-length // multiple) * multiple
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        left = self.tokenizer.padding_side == "left"
        labels = [d.labels[:length] for d in documents]
        if left:
            labels = [[IGNORED_LABEL, *row[1:]] for row in labels]
        batch = {
            "input_ids": _rows([d.tokens[:length] for d in documents], width, padding or 0, left),
            "attention_mask": _rows([[1] * len(row) for row in labels], width, 0, left),
            "labels": _rows(labels, width, IGNORED_LABEL, left),
        }
        if left:
            batch["position_ids"] = _rows([list(range(len(row))) for row in labels], width, 0, left)
        languages = [d.languages[:length] for d in documents]
        return batch | {"language_ids": _rows(languages, width, PADDING_LANGUAGE_ID, left)}

    @torch.no_grad()
    def _keeps_apart(self, model: nn.Module) -> bool:
        """Whether a packed document computes the same, whoever its neighbour is. True where the model cannot be run."""
        if any(p.is_meta or not p.numel() for p in model.parameters()):
            return True  # a model that is loaded, or cut into shards, later
        words, device = _base_model_of(model).config.get_text_config().vocab_size, next(model.parameters()).device
        first, other, second = torch.linspace(0, words - 1, 9).long().view(3, 3).tolist()
        found = []
        for neighbour in (first, other):
            batch = self._pack([_Document(ids, ids, [0] * 3) for ids in (neighbour, second)], 6)
            del batch["labels"]
            with evaluating(model):
                found.append(model(**{name: part.to(device) for name, part in batch.items()}).logits[0, 3:].float())
        # A neighbour that is seen moves logits by about their size; rounding, in 16 bits, by less than a hundredth.
        return bool((found[0] - found[1]).norm() <= 0.02 * found[0].norm())

    def _pack(self, documents: list[_Document], width: Any) -> dict[str, Tensor]:
        tokens = [token for d in documents for token in d.tokens]
        languages = [language for d in documents for language in d.languages]
        # Counted from where the document or the row begins, whichever is nearer.
        places = (place for d in documents for place in range(len(d.tokens)))
        positions = [min(place, at % width) for at, place in enumerate(places)]
        # A first token has no context to be predicted from.
        targets = (label for d in documents for label in d.labels)
        labels = [label if position else IGNORED_LABEL for label, position in zip(targets, positions, strict=True)]
        rest = -len(tokens) % width
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        rows = {
            "input_ids": tokens + [padding or 0] * rest,
            "labels": labels + [IGNORED_LABEL] * rest,
            "language_ids": languages + [PADDING_LANGUAGE_ID] * rest,
            "position_ids": positions + list(range(rest)),
        }
        return {
            name: torch.tensor(values).view((1, -1) if self._one_row else (-1, width)) for name, values in rows.items()
        }


class RoutingCallback(TrainerCallback, ExportableState):
    """Adds the routers' figures to the Trainer's log: auxiliary losses, the share of tokens on expert 0 per group, and
    what was read.

    Means since the last training log, over the tokens of all processes: `load_balancing_loss`, `language_prior_loss`,
    `expert_0_share/<group>`; and over the passes of all: `tokens_per_pass/<group>`, without padding. They reach
    `log_history`, what Trainer prints, and callbacks given after this one. Those of `report_to` come first; for them:
    `trainer.callback_handler.callbacks.insert(0, RoutingCallback())`.

    A checkpoint keeps the sums since the last log, so that the means go on where a training is resumed; not those of
    several processes, whose means begin anew.
    """

    _context: ForwardContext | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {} if self._context is None else self._context.statistics
        sums = [[name, total.tolist(), count.tolist()] for name, (total, count) in kept.items()]
        return {"args": {}, "attributes": {"sums": sums}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._context, saved = _context_of(kwargs.get("model")), resumed_state(self, state)
        if self._context is None:
            return
        self._context.read_statistics()  # what an earlier training left unread
        for name, *sums in saved.get("sums", []) if args.world_size == 1 else []:
            total, count = (torch.tensor(part, dtype=torch.float64, device=args.device) for part in sums)
            self._context.record(name if isinstance(name, str) else tuple(name), total, count)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return  # an evaluation, or the summary at the end
        if (context := _context_of(kwargs.get("model"))) is None:
            return
        figures = context.read_statistics(_of_all_processes)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


class AuxiliaryLossMixin(_Trainer):
    """Adds the routers' auxiliary loss in trainers that make their loss themselves.

    The plain `Trainer` takes the model's own loss, which contains the auxiliary loss already. TRL's `SFTTrainer` makes
    its own from log-probabilities, and so does `Trainer` with label smoothing or `compute_loss_func` from logits:

        class LanguageSFTTrainer(AuxiliaryLossMixin, SFTTrainer): ...

    Keeps the `language` column, too, which `SFTTrainer` would drop, and adds a `TrainingMonitor`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any(isinstance(callback, TrainingMonitor) for callback in self.callback_handler.callbacks):
            self.add_callback(TrainingMonitor())
        model: Any = self.model
        if (context := _context_of(model)) is not None:
            context.name_arguments(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        context = _context_of(model)
        if context is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with context.collect(share_of_step(inputs, num_items_in_batch)) as collected:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # As Trainer does to its own loss: DDP is going to divide what was averaged over the tokens of all processes.
        averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        auxiliary = sum(collected) * (self.accelerator.num_processes if averaged else 1)
        return (result[0] + auxiliary, result[1]) if return_outputs else result + auxiliary

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if "language" not in columns:
            columns.append("language")


def _base_model_of(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _attention_of(model: object) -> str | None:
    """The attention implementation of a model; None of anything else."""
    config = getattr(_base_model_of(model), "config", None) if isinstance(model, nn.Module) else None
    return getattr(config, "_attn_implementation", None)


def _context_of(model: nn.Module | None) -> ForwardContext | None:
    """The side channel of an upcycled model, whatever it is wrapped in."""
    modules = () if model is None else model.modules()
    return next((module.context for module in modules if isinstance(module, MoeDeltaLayer)), None)


def _of_all_processes(sums: Sums) -> list[Sums]:
    """The sums of every process of a group. As objects: a process whose text lacks a group has no such name."""
    if not distributed.is_available() or not distributed.is_initialized():
        return [sums]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, sums)
    return parts


def language_table_of(model: nn.Module | MoeDeltaConfig | LanguageTable) -> LanguageTable:
    """The languages that a model's active adapter, or a configuration, knows.

    Raises:
        DataError: the model has no adapter of this kind.
    """
    if isinstance(model, LanguageTable):
        return model
    config = active_config(model) if isinstance(model, nn.Module) else model
    if config is None:
        raise DataError(
            f"LanguageCollator needs an upcycled model, a MoeDeltaConfig or a LanguageTable to know the languages; got "
            f"{type(model).__name__} without an active MoeDelta adapter."
        )
    return config.language_table


def _rows(rows: list[list[int]], width: int, filler: int, left: bool) -> Tensor:
    """Equal rows by filling up on one side."""
    return torch.tensor([[filler] * (width - len(r)) + r if left else r + [filler] * (width - len(r)) for r in rows])
