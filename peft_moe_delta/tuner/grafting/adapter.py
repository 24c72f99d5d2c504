"""Onto the post-trained model, in memory: the same experts over it, with the post-training delta on every one.

`W_0 + a (E - W_0) + s (P - W_0)` for an expert E, the base's MLP W_0 and the post-trained one P.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...checkpoint import CheckpointReader, resolve
from ...delta import PostTrainingDelta, Scale, graft_tensor, scale_of_groups
from ...delta.vocabulary import is_embedding
from ...errors import GraftError
from ...loading import load_causal_lm
from ..experts import LowRankLinear
from ..vocabulary import first_new_id, grown_layers, match_tokenizers, num_rows
from .checks import check_has_delta, check_siblings
from .report import GraftReport, new_tokens_of
from .weights import base_weights, saved_modules, tuner_of

if TYPE_CHECKING:
    from ..model import MoeDeltaModel

Validation = Callable[[PeftModel], float]
"""A score of a grafted model on held-out text and tasks; higher is better."""

EXPERT_SCALES = (0.25, 0.5, 0.75, 1.0)
"""What `expert_scale="auto"` tries. Between these the score is flat: on the demo, the middles beside the best differed
by less than its noise."""


def graft(
    tuner: MoeDeltaModel,
    post_trained: str | Path | PreTrainedModel,
    *,
    scale: float = 1.0,
    expert_scale: float | Mapping[str, float] | str = 1.0,
    validation: Validation | None = None,
) -> PeftModel:
    """The same experts over the post-trained checkpoint, as a PEFT model whose adapter is all there is to share.

    Args:
        tuner: the upcycled base model; left as it is.
        post_trained: the post-trained model: Hub id, folder, or a loaded model, which is wrapped in place as
            `get_peft_model` does.
        scale: only 1: the adapter cannot carry part of a delta to attention, norms and embeddings.
        expert_scale: `a`, the share of the expert's own change to keep: a number, `{group: number}`, or `"auto"` for
            the best of `EXPERT_SCALES` under `validation`.
        validation: scores a grafted model, higher is better; with `expert_scale="auto"` only.

    Raises:
        GraftError: the post-trained model is not a sibling of the base, a delta is not finite, or a bad scale.
    """
    if scale != 1:
        raise GraftError(
            f"graft() takes attention, norms and embeddings whole from the post-trained model, so scale must be 1; got "
            f"{scale}. Use merge_and_graft(..., scale={scale}) for a stand-alone model."
        )
    return grafted_adapter(tuner, post_trained, Scale(1.0), expert_scale, validation)


def grafted_adapter(
    tuner: MoeDeltaModel,
    post_trained: str | Path | PreTrainedModel,
    scale: Scale,
    expert_scale: float | Mapping[str, float] | str,
    validation: Validation | None = None,
) -> PeftModel:
    """The experts over `W_0 + s (P - W_0)`; a loaded `post_trained` is changed in place. See `graft`."""
    return _Graft(tuner, post_trained, scale).run(expert_scale, validation)


class _Graft:
    """One graft under way: the sibling checked, the adapter moved, experts filled in at a scale."""

    def __init__(self, tuner: MoeDeltaModel, post_trained: str | Path | PreTrainedModel, scale: Scale) -> None:
        self.tuner, self.scale = tuner, scale
        self.name, self.groups = tuner.active_adapters[0], tuner.plan().groups[1:]
        check_has_delta(tuner.active_config)
        model = post_trained if isinstance(post_trained, PreTrainedModel) else _load(post_trained)
        # Trainer leaves its mixed precision on a model it has trained; exactness is a matter of the weights' own.
        model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
        self.model: PreTrainedModel = model.to(next(tuner.model.parameters()).device)
        check_siblings(tuner.model, self.model)
        before, after = base_weights(tuner), dict(self.model.state_dict())
        self.vocabulary = match_tokenizers(
            tuner.model.name_or_path,
            self.model.name_or_path,
            base_rows=num_rows(_shapes(before)),
            post_trained_rows=num_rows(_shapes(after)),
            new_tokens=tuner.active_config.new_tokens or (),
        )
        self.delta = PostTrainingDelta.from_checkpoints(before, after, self.vocabulary)
        self.doubts = doubts = (
            self.delta.report().doubtful
        )  # reads every tensor once: a damaged one ends the graft here
        if doubts:
            warnings.warn(
                f"Grafting looks doubtful: {'; '.join(doubts)}. Score the result before you ship it.", stacklevel=5
            )
        if scale != Scale(1.0):
            self._scale_dense()

    def run(self, expert_scale: float | Mapping[str, float] | str, validation: Validation | None) -> PeftModel:
        """Wrap the post-trained model and give it the experts."""
        if (expert_scale == "auto") != (validation is not None):
            raise GraftError(
                f'expert_scale="auto" and `validation` go together; got expert_scale={expert_scale!r} and '
                f"validation={validation!r}. Pass a function that scores a grafted model, or a number."
            )
        scales = scale_of_groups(self.groups, 1.0 if expert_scale == "auto" else expert_scale)
        config = copy.deepcopy(self.tuner.peft_config[self.name])
        config.base_fingerprint = config.base_model_name_or_path = None  # it gets a new base
        config.first_new_token_id = first_new_id(config, self.vocabulary)
        experts = next(iter(self.tuner.layers().values())).moe_delta_experts[self.name]
        keep_fp32 = next(experts.parameters()).dtype == torch.float32
        # The stage's frozen parts stay frozen: what may follow is a short review.
        grafted = get_peft_model(self.model, config, self.name, autocast_adapter_dtype=keep_fp32)
        if grafted.base_model.active_adapters != [self.name]:
            grafted.set_adapter(self.name)
        self.target = tuner_of(grafted)
        grafted.train(self.tuner.training)
        self._fill(scales)
        trials: list[tuple[float, float]] = []
        if validation is not None:
            trials = [(share, self._score(grafted, share, validation)) for share in EXPERT_SCALES]
            scales = scale_of_groups(self.groups, max(trials, key=lambda trial: trial[1])[0])
            self._fill(scales)
        scale = dict(self.scale.value) if isinstance(self.scale.value, Mapping) else self.scale.value
        report = GraftReport(
            str(self.model.name_or_path), scale, scales, tuple(trials), warnings=self.doubts, **new_tokens_of(config)
        )
        grafted.active_peft_config.graft = asdict(report)
        grafted.graft_report = report  # type: ignore[assignment]  # torch names only tensors and modules
        return grafted

    def _score(self, grafted: PeftModel, expert_scale: float, validation: Validation) -> float:
        self._fill(scale_of_groups(self.groups, expert_scale))
        return float(validation(grafted))

    @torch.no_grad()
    def _scale_dense(self) -> None:
        """`W_0 + s (P - W_0)` for every weight of the dense model."""
        self.delta = PostTrainingDelta.from_checkpoints(
            self.delta.base, {name: tensor.clone() for name, tensor in self.delta.post_trained.items()}
        )
        for name, parameter in self.model.named_parameters():
            scale = self.scale.of(name)
            parameter.copy_(graft_tensor(self.delta.base[name], self.delta.post_trained[name], scale=scale, name=name))

    @torch.no_grad()
    def _fill(self, expert_scales: dict[str, float]) -> None:
        """Give the grafted model its routers and experts."""
        plan = self.tuner.plan()
        for (layer, module_name, source), (_, _, target) in zip(
            self.tuner.expert_layers(), self.target.expert_layers(), strict=True
        ):
            target.moe_delta_router[self.name].load_state_dict(source.moe_delta_router[self.name].state_dict())
            if (classifier := target.classifier(self.name)) is not None:
                classifier.load_state_dict(source.moe_delta_classifier[self.name].state_dict())
            pairs = zip(source.experts(self.name)[1:], target.experts(self.name)[1:], strict=True)
            for index, (expert, grafted) in enumerate(pairs, start=1):
                scale = expert_scales[plan.group_of_expert(layer, index)]
                self._fill_expert(expert, grafted, module_name, scale)
        for source_rows, target_rows in zip(
            grown_layers(self.tuner.model) or (), grown_layers(self.target.model) or (), strict=True
        ):
            if self.name in target_rows.settings:
                target_rows.rows(self.name).copy_(source_rows.rows(self.name))
        for (name, trained), (_, saved) in zip(
            saved_modules(self.tuner, self.name), saved_modules(self.target, self.name), strict=True
        ):
            for key, parameter in saved.named_parameters():
                self._graft_into(parameter, f"{name}.{key}", trained.get_parameter(key), 1.0)

    def _fill_expert(self, expert: nn.Module, grafted: nn.Module, module_name: str, expert_scale: float) -> None:
        for name, parameter in grafted.named_parameters():
            owner = grafted.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, LowRankLinear):
                # W_0 + B A + Delta = P + B A: the change is re-attached, shrunk on one side
                source = expert.get_parameter(name)
                parameter.copy_(source * expert_scale if name.endswith("B") else source)
            else:
                self._graft_into(parameter, f"{module_name}.{name}", expert.get_parameter(name), expert_scale)

    def _graft_into(self, parameter: nn.Parameter, name: str, trained: Tensor, expert_scale: float) -> None:
        base, post_trained = self.delta.base[name], self.delta.post_trained[name]
        if self.vocabulary is not None and is_embedding(name):
            trained = self.vocabulary.align(trained, post_trained)
        parameter.copy_(
            graft_tensor(
                base, post_trained, trained, scale=self.scale.of(name), expert_scale=expert_scale,
                dtype=parameter.dtype, name=name,
            )
        )  # fmt: skip


def _load(post_trained: str | Path) -> PreTrainedModel:
    """A dense checkpoint in its own dtype, its files checked first.

    Raises:
        CheckpointError: no such checkpoint, or a file of it is missing or damaged.
    """
    folder = resolve(post_trained)
    CheckpointReader(folder)
    model = load_causal_lm(folder, dtype="auto")
    model.name_or_path = str(post_trained)  # a Hub id stays one: the grafted adapter names it as its base
    return model


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}
