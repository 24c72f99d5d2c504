"""The steps that train, each one run of the plain Hugging Face `Trainer`.

In: models, text and tasks as the recipe names them. Out: checkpoints and adapters in the folders of their steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollator,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..errors import DataError
from ..evaluation import encode_task
from ..hub.card import PLAN_FILE
from ..identifier import fit_identifier
from ..loading import load_adapter, load_causal_lm, load_tokenizer
from ..sources import Documents, TextSource, read_tasks
from ..training import LanguageCollator, RoutingCallback
from ..tuner import MoeDeltaConfig
from ..vocabulary import extend_vocabulary, save_tokenizer
from .data import shuffled
from .fields import Precision, Recipe, Review, Training, Tuning
from .trainer import StepMonitor, StepTrainer, training_arguments
from .unfinished import Checkpoints
from .workspace import LOG_FILE

IDENTIFIER_FILE = "identifier.json"
_IDENTIFIED_BYTES = 20_000_000  # of a language, to count its tokens: 300 kB are plenty
BY_CONTEXT = "by_context"
"""The step, and so the folder, of the model that reads languages from the text."""

Features = list[dict[str, Any]]


def settled_precision(precision: Precision) -> Precision:
    """`"auto"` as what this machine computes faster in.

    Without matrix units a processor multiplies bf16 at half the speed of fp32, even where it has instructions for it.
    """
    if precision != "auto":
        return precision
    knows: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    # PyTorch may be told to leave them alone (ATEN_CPU_CAPABILITY), and its attention in bf16 then fails.
    matrix_units = knows.get("amx_bf16", False) and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "bf16" if matrix_units or (torch.cuda.is_available() and torch.cuda.is_bf16_supported()) else "fp32"


class HasText(Protocol):
    """A language of a recipe, as far as training goes."""

    @property
    def train(self) -> str | TextSource: ...


class Job(Protocol):
    """What a recipe says that every training needs."""

    @property
    def languages(self) -> Mapping[str, HasText]: ...
    @property
    def precision(self) -> str: ...
    @property
    def seed(self) -> int: ...


def load_model(model: str | Path, **options: Any) -> PreTrainedModel:
    """A causal LM in fp32, which small updates need; on the first GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_causal_lm(model, dtype=torch.float32, **options)
    return loaded.to(device)  # type: ignore[arg-type]  # transformers' decorated `to` loses its self


def load_made(checkpoint: Path | str, recipe: Recipe) -> PreTrainedModel:
    """A checkpoint to look at, with its own modelling file where the recipe has just written one."""
    written = Path(checkpoint).parent == Path(recipe.output)
    own = written and (recipe.graft.remote_code or Path(checkpoint).name == BY_CONTEXT)
    return load_model(checkpoint, trust_remote_code=own)


def save_with_tokenizer(model: PreTrainedModel | PeftModel, tokenizer_of: str | Path, folder: Path) -> None:
    """A checkpoint with the tokenizer, chat template included, of another one, and the model's own new tokens."""
    model.save_pretrained(str(folder))
    save_tokenizer(extend_vocabulary(model, load_tokenizer(tokenizer_of)), folder)


def tune(recipe: Recipe, base: Path | str, fields: Tuning, folder: Path, checkpoints: Checkpoints) -> None:
    """Supervised tuning: the base model learns tasks with exact answers and becomes the post-trained model."""
    tokenizer = load_tokenizer(base)
    features: Features = []
    for task in read_tasks(fields.tasks):
        input_ids, labels = encode_task(tokenizer, task["prompt"], task["answer"])
        features.append({"input_ids": input_ids, "labels": labels})
    model = load_model(base)
    _train(recipe, model, features, fields, DataCollatorForSeq2Seq(tokenizer, padding=True), folder, checkpoints)
    save_with_tokenizer(model, base, folder)


def adapter_config(recipe: Recipe) -> MoeDeltaConfig:
    """The configuration that stage 1 starts from."""
    groups = {code: language.group for code, language in recipe.languages.items()}
    return MoeDeltaConfig(languages=groups, **vars(recipe.adapter))


def expand(recipe: Recipe, base: Path | str, folder: Path, checkpoints: Checkpoints) -> None:
    """Stage 1: new experts learn from new-language text."""
    model = get_peft_model(load_model(base), adapter_config(recipe))
    tokenizer = load_tokenizer(base)
    features = blocks(recipe, tokenizer, recipe.expanded_languages, recipe.expand)
    train(recipe, model, features, recipe.expand, tokenizer, folder, checkpoints)
    save_adapter(model, folder)


def review(
    recipe: Recipe, base: Path | str, expanded: Path, fields: Review, folder: Path, checkpoints: Checkpoints
) -> None:
    """Stage 2: the routers alone learn from all languages which expert serves whom."""
    model = load_adapter(load_model(base), expanded, is_trainable=True)
    model.start_review(
        routing=fields.routing,
        language_prior_coef=fields.language_prior_coef,
        language_prior_groups=fields.language_prior_groups,
    )
    tokenizer = load_tokenizer(base)
    features = blocks(recipe, tokenizer, list(recipe.languages), fields)
    train(recipe, model, features, fields, tokenizer, folder, checkpoints)
    save_adapter(model, folder)


def identify(recipe: Recipe, base: Path | str, adapter: Path, folder: Path) -> None:
    """What routing by context knows of each language, counted from the text that the adapter was trained on."""
    model, tokenizer = load_adapter(load_model(base), adapter, is_trainable=True), load_tokenizer(base)
    texts = {code: Documents(language.train, code, _IDENTIFIED_BYTES) for code, language in recipe.languages.items()}
    report = fit_identifier(model, texts, tokenizer)
    save_adapter(model, folder)
    (folder / IDENTIFIER_FILE).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")


def dense(recipe: Recipe, base: Path | str, fields: Training, folder: Path, checkpoints: Checkpoints) -> None:
    """What one would do without experts: continual pre-training of the whole dense model on the very same tokens."""
    tokenizer = load_tokenizer(base)
    features = blocks(recipe, tokenizer, recipe.expanded_languages, recipe.expand)
    for feature in features:
        feature["labels"] = feature["input_ids"]
        del feature["language"]
    model = load_model(base)
    _train(recipe, model, features, fields, default_data_collator, folder, checkpoints)
    save_with_tokenizer(model, base, folder)


def blocks(recipe: Job, tokenizer: PreTrainedTokenizerBase, languages: Sequence[str], fields: Training) -> Features:
    """Equally many blocks of `sequence_length` tokens of each language, enough for every step, shuffled.

    Raises:
        DataError: a language has too little text.
    """
    each = -(-fields.sequences // len(languages))
    features: Features = []
    for code in languages:
        tokens: list[int] = []
        for text in shuffled(recipe.languages[code].train, code, recipe.seed):
            tokens += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(tokens) >= each * fields.sequence_length:
                break
        starts = range(0, len(tokens) - fields.sequence_length + 1, fields.sequence_length)
        if len(starts) < each:
            raise DataError(
                f"{recipe.languages[code].train} has {len(tokens):,} tokens of {code!r}; {fields.steps} steps of "
                f"{fields.sequences // fields.steps} x {fields.sequence_length} tokens need "
                f"{each * fields.sequence_length:,} of each language. Bring more text, or train for fewer steps."
            )
        features += [{"input_ids": tokens[s : s + fields.sequence_length], "language": code} for s in starts[:each]]
    random.Random(recipe.seed).shuffle(features)
    return features


def save_adapter(model: PeftModel, folder: Path) -> None:
    """The adapter, and beside it the plan of its experts."""
    model.save_pretrained(str(folder))
    tuner: Any = model.base_model
    (folder / PLAN_FILE).write_text(tuner.plan().to_json(), encoding="utf-8")


def train(
    recipe: Job,
    model: PeftModel,
    features: Features,
    fields: Training,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    checkpoints: Checkpoints,
) -> None:
    """Train an upcycled model on documents that know their language; the log goes to `folder`.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM has stopped it, and a checkpoint is saved.
    """
    collator = LanguageCollator(tokenizer, model)
    collator.look_through(features)
    _train(recipe, model, features, fields, collator, folder, checkpoints)


def _train(
    recipe: Job,
    model: torch.nn.Module,
    features: Features,
    fields: Training,
    collator: DataCollator,
    folder: Path,
    checkpoints: Checkpoints,
) -> None:
    """The plain Trainer, from the last checkpoint if there is one; its log lies beside the step's result."""
    last, monitor = checkpoints.begin(), StepMonitor(checkpoints.interruption)
    trainer = StepTrainer(
        model,
        training_arguments(fields, checkpoints.folder, precision=recipe.precision, seed=recipe.seed),
        train_dataset=features,
        data_collator=collator,
        callbacks=[RoutingCallback(), monitor],
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last.folder))
    if monitor.stopped:
        raise KeyboardInterrupt(
            f"what was finished is kept; {checkpoints.name} has a checkpoint of {checkpoints.last()}, where the next "
            "run goes on"
        )
    log = json.dumps(trainer.state.log_history, indent=1, sort_keys=True)  # Trainer sorts what a checkpoint keeps
    (folder / LOG_FILE).write_text(log, encoding="utf-8")
