"""Grafting: an adapter trained on the base model moves onto the post-trained one.

In: an upcycled base model and its post-trained sibling. Out: the same experts over the post-trained model, with the
post-training delta on every expert (DeltaMoE, arXiv 2605.18083): `W_0 + a (E - W_0) + s (P - W_0)`.

`graft` gives a PEFT model; `merge_and_graft` goes on from there and gives a stand-alone stock model. The model that is
grafted from is never changed: un-grafting means using it again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..checkpoint import CheckpointReader, resolve
from ..delta import PostTrainingDelta, Scale, graft_tensor, scale_of_groups
from ..delta.vocabulary import is_embedding
from ..errors import GraftError
from ..export import ReplicatedLayout, UpcycledWeights, build_model, choose, explain_choice
from ..routing import ClassifierRouting
from .comparison import compare_export, rounded_routes
from .config import MoeDeltaConfig
from .experts import LowRankLinear
from .layer import MoeDeltaLayer
from .vocabulary import grown_layers, match_tokenizers, num_rows

if TYPE_CHECKING:
    from .model import MoeDeltaModel

Validation = Callable[[PeftModel], float]
"""A score of a grafted model on held-out text and tasks; higher is better."""

EXPERT_SCALES = (0.25, 0.5, 0.75, 1.0)
"""What `expert_scale="auto"` tries first; it then tries the middles beside the best."""


@dataclass(frozen=True)
class GraftReport:
    """What was grafted and how; `model.graft_report` of the result, and `graft` in a grafted adapter's config.

    Attributes:
        post_trained: name or path of the post-trained model.
        scale: share of the post-training delta, a number or one a name pattern.
        expert_scale: share of each group's own change that was kept.
        trials: `(expert_scale, score)` of every trial of `"auto"`, in order.
        layout: name of the stock architecture; None for an adapter.
        language: the language a dense export was made for; None otherwise.
        max_logit_difference: largest fp32 logit difference between export and grafted adapter; None for an adapter.
        choice: why that architecture, in one line; None for an adapter.
        replicated_bytes: what copies of the experts of dense layers added to the export.
        route_agreement: share of routes on which a 16-bit export and the adapter agree; None where not measured.
        new_tokens: tokens learnt in expansion, which stand behind the post-trained tokenizer's own.
        first_new_token_id: id of the first of them; None without any.
    """

    post_trained: str
    scale: float | Mapping[str, float]
    expert_scale: dict[str, float]
    trials: tuple[tuple[float, float], ...] = ()
    layout: str | None = None
    language: str | None = None
    max_logit_difference: float | None = None
    choice: str | None = None
    replicated_bytes: int = 0
    route_agreement: float | None = None
    new_tokens: tuple[str, ...] = ()
    first_new_token_id: int | None = None


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
            the best under `validation`.
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


def merge_and_graft(
    tuner: MoeDeltaModel,
    post_trained: str | Path | PreTrainedModel,
    *,
    scale: float | Mapping[str, float] = 1.0,
    expert_scale: float | Mapping[str, float] | str = 1.0,
    validation: Validation | None = None,
    language: str | None = None,
    replicate_dense_layers: bool = False,
    remote_code: bool = False,
    tolerance: float = 1e-4,
) -> PreTrainedModel:
    """A stand-alone model in a stock architecture, ready for `save_pretrained` and `push_to_hub`.

    Args:
        tuner, post_trained, expert_scale, validation: as in `graft`; a loaded `post_trained` is left as it is.
        scale: `s`, the share of the post-training delta: a number, or `{pattern: number}` over parameter names.
        language: for routing by language, what that language runs on: a dense model where its group has at most one
            expert a layer, else a stock mixture of its group's experts.
        replicate_dense_layers: where no architecture keeps dense layers, write copies of their one expert; the report
            says what that costs.
        remote_code: where no stock architecture is exact (unequal experts a layer, other families, routing by language
            for all languages, which then takes `language_ids`), use the dense architecture with a small modelling
            file of its own, which is saved along and loads with `trust_remote_code=True`, without this package.
        tolerance: largest allowed difference of fp32 logits between the result and the grafted adapter.

    Returns:
        A model in the post-trained model's dtype, with its config and generation config, and `graft_report`.

    Raises:
        GraftError: as in `graft`; or no stock architecture holds the model exactly (the message says what does).
    """
    if isinstance(post_trained, PreTrainedModel):
        post_trained = copy.deepcopy(post_trained)
    grafted = grafted_adapter(tuner, post_trained, Scale(scale), expert_scale, validation)
    return to_stock(
        grafted,
        language=language,
        replicate_dense_layers=replicate_dense_layers,
        remote_code=remote_code,
        tolerance=tolerance,
    )


def grafted_adapter(
    tuner: MoeDeltaModel,
    post_trained: str | Path | PreTrainedModel,
    scale: Scale,
    expert_scale: float | Mapping[str, float] | str,
    validation: Validation | None = None,
) -> PeftModel:
    """The experts over `W_0 + s (P - W_0)`; a loaded `post_trained` is changed in place. See `graft`."""
    return _Graft(tuner, post_trained, scale).run(expert_scale, validation)


def to_stock(
    model: PeftModel,
    *,
    language: str | None = None,
    replicate_dense_layers: bool = False,
    remote_code: bool = False,
    tolerance: float = 1e-4,
) -> PreTrainedModel:
    """An upcycled model, grafted or not, as a stand-alone stock model; see `merge_and_graft`.

    The export is built and compared with the adapter in fp32, and then built in the dense model's own dtype.
    """
    tuner = _tuner(model)
    weights = _weights(tuner, language, remote_code)
    chosen = choose(weights, replicate_dense_layers=replicate_dense_layers, remote_code=remote_code)
    in_fp32 = weights.dtype == torch.float32
    exact = model if in_fp32 else copy.deepcopy(model).float()
    exported = build_model(_weights(_tuner(exact), language, remote_code), chosen.layout)
    difference = compare_export(weights, exact, exported, language=language, tolerance=tolerance)
    if not in_fp32:
        exported = build_model(weights, chosen.layout)
    exported.generation_config = copy.deepcopy(tuner.model.generation_config)
    config = tuner.active_config
    report = config.graft or asdict(GraftReport(str(tuner.model.name_or_path), 0.0, {}, **_new_tokens(config)))
    found = {
        "layout": exported.config.model_type,
        "language": language,
        "max_logit_difference": difference,
        "replicated_bytes": weights.replicated_bytes if isinstance(chosen.layout, ReplicatedLayout) else 0,
        "route_agreement": None if in_fp32 else rounded_routes(weights, model, exported),
        "choice": explain_choice(weights, chosen),
    }
    exported.graft_report = GraftReport(**(report | found))  # type: ignore[assignment]  # as in `_Graft.run`
    return exported.eval()


def _weights(tuner: MoeDeltaModel, language: str | None, remote_code: bool) -> UpcycledWeights:
    """What is exported of a model in memory."""
    name, config, layers = tuner.active_adapters[0], tuner.active_config, tuner.layers()
    weights = UpcycledWeights(
        config=_config(tuner),
        plan=tuner.plan(),
        top_k=config.experts_per_token,
        dense=trained_weights(tuner),
        experts=lambda layer, expert: layers[layer].expert_weights(name, expert),
        routers=lambda layer: layers[layer].router(name).rows.detach(),
    )
    return exported_share(weights, config, language, remote_code=remote_code)


def exported_share(
    weights: UpcycledWeights, config: MoeDeltaConfig, language: str | None, *, remote_code: bool = False
) -> UpcycledWeights:
    """What is exported: everything under learned routing, one group's share under routing by language.

    Raises:
        GraftError: no stock architecture can say how this adapter routes; or a language is missing, or given where
            routing does not ask for one.
    """
    table = config.language_table
    if reason := why_not_encodable(config):
        raise GraftError(f"{reason} Or use graft() and share the adapter.")
    if config.routing_rule.needs_language and language is None:
        if remote_code:
            return replace(weights, languages=table)
        raise GraftError(
            f"Routing {config.routing!r} cannot be encoded in a stock architecture, which has no input for a token's "
            f"language. Pass language=... (one of {', '.join(table.codes)}) for the model that this language runs "
            'on, remote_code=True (from file to file: target="remote_code") for a model with its own modelling file, '
            "or use graft() and share the adapter."
        )
    if not config.routing_rule.needs_language and language is not None:
        raise GraftError(
            f"language={language!r} selects experts under routing by language, but this adapter's routing is "
            f"{config.routing!r}: every language uses all experts. Leave `language` out."
        )
    return weights if language is None else weights.for_group(table.groups[table.group_of[table.id_of(language)]])


def why_not_encodable(config: MoeDeltaConfig) -> str | None:
    """Why no stand-alone form can say what an adapter's routing does, and what to do; None where one may."""
    if config.attention_experts is not None:
        return (
            f"No stand-alone form holds attention experts (attention_experts={config.attention_experts!r}). Train with "
            "MLP experts alone for one."
        )
    if not config.norm_topk_prob:
        return (
            "Stand-alone forms renormalise the weights of a token's experts, and norm_topk_prob=False does not. Train "
            "with norm_topk_prob=True for one."
        )
    if isinstance(config.routing_rule, ClassifierRouting):
        return (
            "Routing 'classifier' cannot be encoded in a stand-alone model, whose routers have no gate before them. "
            'Review it under routing="learned" and export that.'
        )
    if not config.routing_rule.needs_language and config.open_steps < config.newest_step:
        groups = zip(config.language_table.groups, config.steps, strict=True)
        closed = [group for group, step in groups if step > config.open_steps]
        return (
            f"The experts of {', '.join(closed)} are not open to every language yet, which no stand-alone model can "
            "say. Train the new groups' rows first: start_review(), then a short training on all languages."
        )
    return None


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
        _check_siblings(tuner.model, self.model)
        before, after = base_weights(tuner), dict(self.model.state_dict())
        self.vocabulary = match_tokenizers(
            tuner.model.name_or_path,
            self.model.name_or_path,
            base_rows=num_rows(_shapes(before)),
            post_trained_rows=num_rows(_shapes(after)),
            new_tokens=tuner.active_config.new_tokens or (),
        )
        self.delta = PostTrainingDelta.from_checkpoints(before, after, self.vocabulary)
        doubts = self.delta.report().doubtful  # reads every tensor once: a damaged one ends the graft here
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
        if config.new_tokens and self.vocabulary is not None:
            config.first_new_token_id = self.vocabulary.next_id
        experts = next(iter(self.tuner.layers().values())).moe_delta_experts[self.name]
        keep_fp32 = next(experts.parameters()).dtype == torch.float32
        # The stage's frozen parts stay frozen: what may follow is a short review.
        grafted = get_peft_model(self.model, config, self.name, autocast_adapter_dtype=keep_fp32)
        if grafted.base_model.active_adapters != [self.name]:
            grafted.set_adapter(self.name)
        self.target = _tuner(grafted)
        grafted.train(self.tuner.training)
        self._fill(scales)
        trials: list[tuple[float, float]] = []
        if validation is not None:
            trials = self._search(grafted, validation)
            scales = scale_of_groups(self.groups, max(trials, key=lambda trial: trial[1])[0])
            self._fill(scales)
        scale = dict(self.scale.value) if isinstance(self.scale.value, Mapping) else self.scale.value
        report = GraftReport(str(self.model.name_or_path), scale, scales, tuple(trials), **_new_tokens(config))
        grafted.active_peft_config.graft = asdict(report)
        grafted.graft_report = report  # type: ignore[assignment]  # torch names only tensors and modules
        return grafted

    def _search(self, grafted: PeftModel, validation: Validation) -> list[tuple[float, float]]:
        """Score a coarse grid, then the middles on either side of its best."""
        scores: dict[float, float] = {}

        def score(scale: float) -> None:
            if scale not in scores:
                self._fill(scale_of_groups(self.groups, scale))
                scores[scale] = float(validation(grafted))

        for scale in EXPERT_SCALES:
            score(scale)
        best = max(scores, key=scores.__getitem__)
        grid = (0.0, *EXPERT_SCALES)
        for neighbour in (s for s in grid if abs(grid.index(s) - grid.index(best)) == 1):
            score((best + neighbour) / 2)
        return list(scores.items())

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
            _saved_modules(self.tuner, self.name), _saved_modules(self.target, self.name), strict=True
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


def base_weights(tuner: MoeDeltaModel) -> dict[str, Tensor]:
    """The dense base model's weights under its own names."""
    state = {}
    for name, tensor in tuner.model.state_dict().items():
        if ".moe_delta_" in name or ".modules_to_save." in name:
            continue
        state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return state


def trained_weights(tuner: MoeDeltaModel) -> dict[str, Tensor]:
    """The dense weights in force: the base model's, with the active adapter's `modules_to_save` in place."""
    state = base_weights(tuner)
    for name, module in _saved_modules(tuner, tuner.active_adapters[0]):
        state |= {f"{name}.{key}": parameter.detach() for key, parameter in module.named_parameters()}
    for layer in grown_layers(tuner.model) or ():
        if layer.in_force is not None:
            state[f"{_name_of(tuner.model, layer)}.weight"] = layer.grown_weight(layer.in_force)
    return state


def _config(tuner: MoeDeltaModel) -> PretrainedConfig:
    """The dense model's config, with the vocabulary in force."""
    config = tuner.model.config
    grown = grown_layers(tuner.model)
    if grown is None or grown[0].in_force is None:
        return config
    config = copy.deepcopy(config)
    config.vocab_size = len(grown[0].grown_weight(grown[0].in_force))
    return config


def _new_tokens(config: MoeDeltaConfig) -> dict[str, Any]:
    """What a report says of them."""
    return {"new_tokens": tuple(config.new_tokens or ()), "first_new_token_id": config.first_new_token_id}


def _saved_modules(tuner: MoeDeltaModel, adapter_name: str) -> list[tuple[str, nn.Module]]:
    return [
        (name, module.modules_to_save[adapter_name])
        for name, module in tuner.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    ]


def _load(post_trained: str | Path) -> PreTrainedModel:
    """A dense checkpoint in its own dtype, its files checked first.

    Raises:
        CheckpointError: no such checkpoint, or a file of it is missing or damaged.
    """
    folder = resolve(post_trained)
    CheckpointReader(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.name_or_path = str(post_trained)  # a Hub id stays one: the grafted adapter names it as its base
    return model


def check_has_delta(config: MoeDeltaConfig) -> None:
    """Refuse a model that no post-trained one descends from.

    Raises:
        GraftError: it was mixed, and not with its seed's own weights outside of experts.
    """
    if (config.mixed or {}).get("others", "seed") != "seed":
        raise GraftError(
            "This model's weights outside of experts are an average of the models it was mixed from. A "
            'post-training delta belongs to the seed alone: mix with others="seed" and graft that.'
        )


def check_same_kind(base: str, post_trained: str) -> None:
    """Refuse two model types.

    Raises:
        GraftError: they differ.
    """
    if base != post_trained:
        raise GraftError(
            f"The base model is a {base!r}, the other one a {post_trained!r}. A post-training delta exists only "
            "between a model and its own tuned descendant."
        )


def _check_siblings(base: PreTrainedModel, post_trained: PreTrainedModel) -> None:
    """Refuse a post-trained model that cannot be the base model's own.

    Raises:
        GraftError: another architecture, or no dense model.
    """
    check_same_kind(base.config.model_type, post_trained.config.model_type)
    if any(isinstance(module, MoeDeltaLayer) for module in post_trained.modules()):
        raise GraftError("The post-trained model is upcycled already. Pass the dense post-trained checkpoint.")


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _tuner(model: PeftModel) -> MoeDeltaModel:
    """The upcycled model inside PEFT's wrapper, which calls it just a module."""
    return cast("MoeDeltaModel", model.base_model)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)
