"""The graft as a step: the reviewed adapter and the post-trained model become a stock checkpoint that was tried out.

In: base, adapter, post-trained model. Out: a checkpoint folder with tokenizer, `graft.json` and the proof that a
process without this package loads it and computes the same.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import calibrate_routers, made_up_conversations
from ..checkpoint import CheckpointReader
from ..errors import GraftError
from ..evaluation import TaskSet
from ..evaluation.loading import with_learnt_tokens
from ..evaluation.scoring import Material
from ..graft.arithmetic import graft_tensor
from ..graft.delta import PostTrainingDelta
from ..graft.memory import EXPERT_SCALES, grafted_adapter, to_stock, tuner_of
from ..graft.report import EQUAL
from ..graft.scale import Scale
from ..hub.card import GRAFT_FILE
from ..loading import load_adapter, load_tokenizer
from ..sources import pool, read_tasks, read_texts
from .checks import calibration
from .data import held_out
from .fields import AUTO, Recipe
from .scoring import CHAT_FILE, arithmetic, bar, scores_of
from .stages import load_model, save_with_tokenizer

_RELOAD = Path(__file__).with_name("reload.py")
_RELOAD_TOLERANCE = 1e-3
_SHOWN = 16  # conversations to measure routes on


def graft(recipe: Recipe, base: Path | str, adapter: Path, post_trained: Path | str, folder: Path) -> None:
    """Graft, calibrate, export; saved with the post-trained model's tokenizer, reloaded by plain transformers.

    Beside the checkpoint lie some conversations that the post-trained model made up, which no router was shown: what
    chat is, for whoever measures its routes.
    """
    fields, model = recipe.graft, load_adapter(load_model(base), adapter)
    validation = _Validation(recipe, base) if fields.expert_scale == AUTO else None
    tuner = tuner_of(model)
    meant = [EQUAL] if recipe.over_post_trained else []
    grafted = grafted_adapter(tuner, post_trained, Scale(fields.scale), fields.expert_scale, validation, meant=meant)
    del model, tuner, validation  # memory that what follows needs
    shown = _calibrate(recipe, grafted, load_tokenizer(post_trained))
    chat = to_stock(
        grafted,
        language=fields.language,
        replicate_dense_layers=fields.replicate_dense_layers,
        remote_code=fields.remote_code,
        architecture=fields.architecture,
        serve_with=fields.serve_with,
    )
    del grafted
    _ship(chat, post_trained, folder, own_code=fields.remote_code)
    (folder / CHAT_FILE).write_text(json.dumps(shown, indent=1, ensure_ascii=False), encoding="utf-8")


def graft_by_context(
    recipe: Recipe, base: Path | str, adapter: Path, post_trained: Path | str, stock: Path, folder: Path
) -> None:
    """The graft once more, as it reads languages from the text: the same shares as in the folder of `stock`."""
    model = load_adapter(load_model(base), adapter)
    shares = json.loads((stock / GRAFT_FILE).read_text(encoding="utf-8"))["expert_scale"]
    tuner = tuner_of(model)
    with tuner.in_routing("context"):
        meant = [EQUAL] if recipe.over_post_trained else []
        grafted = grafted_adapter(tuner, post_trained, Scale(recipe.graft.scale), shares, meant=meant)
    del model, tuner  # memory that what follows needs
    _ship(to_stock(grafted, remote_code=True), post_trained, folder, own_code=True)


def _ship(chat: PreTrainedModel, post_trained: Path | str, folder: Path, *, own_code: bool) -> None:
    """Save a stand-alone model with its tokenizer and `graft.json`, once another process has loaded it."""
    chat.save_pretrained(str(folder))  # with the post-trained model's tokenizer
    found: Any = chat.graft_report
    report = asdict(found) | {"post_trained": str(post_trained), "reload": _reload(chat, folder, own_code=own_code)}
    (folder / GRAFT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _calibrate(recipe: Recipe, grafted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Calibrate the routers, where they have a say and the recipe wants it. Returns conversations not shown to them."""
    if grafted.active_peft_config.routing_rule.needs_language:
        return []
    tokenizer, fields = with_learnt_tokens(tokenizer, grafted), calibration(recipe)
    made: list[str] = []
    with arithmetic(recipe):
        if tokenizer.chat_template is not None and (fields is None or fields.conversations):
            number = 0 if fields is None else fields.conversations
            said = bar("conversations, made up")
            made = made_up_conversations(grafted, tokenizer, _SHOWN + number, seed=recipe.seed, progress=said)
        shown, made = made[:_SHOWN], made[_SHOWN:]
        if fields is not None:
            texts = {}
            for code, language in recipe.languages.items():
                documents = read_texts(language.train, language=code, documents=pool(fields.documents))
                drawn = random.Random(recipe.seed).sample(range(len(documents)), min(fields.documents, len(documents)))
                texts[code] = [documents[index] for index in drawn]
            calibrate_routers(
                grafted,
                texts,
                tokenizer,
                conversations=made,
                steps=fields.steps,
                answer_cost=fields.answer_cost,
                max_length=fields.sequence_length,
                seed=recipe.seed,
                progress=bar("calibration"),
            )
    return shown


def graft_dense(recipe: Recipe, base: Path | str, tuned: Path, post_trained: Path | str, folder: Path) -> None:
    """A continually pre-trained dense model T plus the delta: `W_0 + a (T - W_0) + (P - W_0)` (arXiv 2504.21023).

    Where our own share of the experts' change is chosen on validation material, so is `a`: by the same criterion, among
    the same values, on the same files.
    """
    model, before, after = load_model(tuned), load_model(base), load_model(post_trained)
    delta = PostTrainingDelta.from_checkpoints(dict(before.named_parameters()), dict(after.named_parameters()))
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def fill(share: float) -> None:
        for name, parameter in model.named_parameters():
            before, after = delta.base[name], delta.post_trained[name]
            parameter.copy_(graft_tensor(before, after, trained[name], expert_scale=share, name=name))

    share, trials = 1.0, []
    if recipe.graft.expert_scale == AUTO:
        validation = _Validation(recipe, base)
        validation.set_reference(after)
        for tried in EXPERT_SCALES:
            fill(tried)
            trials.append((tried, validation(model)))
        share = max(trials, key=lambda trial: trial[1])[0]
    fill(share)
    save_with_tokenizer(model, post_trained, folder)
    report = {"expert_scale": share, "trials": trials}
    (folder / GRAFT_FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")


class _Validation:
    """Score of a grafted model against the post-trained one on validation material, as fractions of equal weight.

    `mean over expanded languages of (1 - bits / post-trained's bits) + mean over tasks of (exact match -
    post-trained's)`.
    """

    def __init__(self, recipe: Recipe, base: Path | str) -> None:
        limits = recipe.limits
        texts = {
            code: held_out(file, code, limits, limits.validation_documents, recipe.seed)
            for code in recipe.expanded_languages
            if (file := recipe.languages[code].validation)
        }
        tasks = {
            name: TaskSet(read_tasks(t.validation, limits.validation_tasks))
            for name, t in recipe.tasks.items()
            if t.validation
        }
        self._recipe, self._tokenizer = recipe, load_tokenizer(base)
        self._material = Material(texts=texts, tasks=tasks)
        self._reference: tuple[list[float], list[float]] | None = None

    def set_reference(self, post_trained: PreTrainedModel | PeftModel) -> None:
        """Measure what scores are compared with."""
        self._reference = self._measure(post_trained)

    def __call__(self, grafted: PreTrainedModel | PeftModel) -> float:
        if self._reference is None:
            assert isinstance(grafted, PeftModel)
            with grafted.disable_adapter():  # what is left is the post-trained model
                self.set_reference(grafted)
        assert self._reference is not None
        bits, matches = self._measure(grafted)
        gain = statistics.fmean(1 - now / before for now, before in zip(bits, self._reference[0], strict=True))
        kept = [now - before for now, before in zip(matches, self._reference[1], strict=True)]
        return gain + (statistics.fmean(kept) if kept else 0.0)

    def _measure(self, model: PreTrainedModel | PeftModel) -> tuple[list[float], list[float]]:
        scores = scores_of(model, self._tokenizer, self._material, self._recipe)
        return [text.value for text in scores.texts.values()], [task.value for task in scores.tasks.values()]


def _reload(chat: PreTrainedModel, folder: Path, *, own_code: bool) -> dict[str, str | float]:
    """Load the checkpoint in a process that cannot import this package, and compare logits.

    Raises:
        GraftError: that process failed, or computed something else.
    """
    proof = folder / "reload.safetensors"
    given = [str(folder), str(proof), *(["own code"] if own_code else [])]
    child = subprocess.run([sys.executable, str(_RELOAD), *given], capture_output=True, text=True)
    if child.returncode:
        raise GraftError(f"Plain transformers cannot load the checkpoint in {folder}:\n{child.stderr[-2000:]}")
    found = CheckpointReader(proof)
    architecture, input_ids, logits = found.metadata["architecture"], found["input_ids"], found["logits"]
    proof.unlink()
    with torch.inference_mode():
        expected = chat(input_ids=input_ids.to(chat.device)).logits.float().cpu()
    difference = (expected - logits).abs().max().item()
    if not difference <= _RELOAD_TOLERANCE:
        raise GraftError(
            f"The reloaded checkpoint computes other logits (by up to {difference:.3g}) than the model that was saved. "
            "Please report the two configs."
        )
    return {"architecture": architecture, "max_logit_difference": difference}
