"""Grafts in memory: the same experts over the post-trained model, and out of PEFT as a stand-alone model.

In: an upcycled model and its post-trained sibling. Out: a PEFT model (`graft`), or a stock one (`merge_and_graft`). The
model that is grafted from is never changed: un-grafting means using it again.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..checkpoint import resolve
from ..errors import GraftError
from ..export import UpcycledWeights, build_model, choose, explain_choice
from ..loading import load_causal_lm
from ..tuner import MoeDeltaLayer, MoeDeltaTuner
from ..tuner.record import AdapterRecord
from .adapter import Adapter
from .comparison import compare_export, rounded_routes
from .dense import Dense
from .doubts import doubts
from .kinship import check_has_delta, check_same_kind, match_vocabularies
from .report import GraftReport
from .scale import Scale, scale_of_groups
from .side_files import StockGenerationConfig
from .weights import GraftedWeights, exported_share

Validation = Callable[[PeftModel], float]
"""A score of a grafted model on held-out text and tasks; higher is better."""

EXPERT_SCALES = (0.25, 0.5, 0.75, 1.0)
"""What `expert_scale="auto"` tries. Between these the score is flat: on the demo, the middles beside the best differed
by less than its noise."""

ExpertScale = float | Mapping[str, float] | str
"""A number, one for each group, or `"auto"`."""


def graft(
    tuner: MoeDeltaTuner,
    post_trained: str | Path | PreTrainedModel,
    *,
    scale: float = 1.0,
    expert_scale: ExpertScale = 1.0,
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


def merge_and_graft(
    tuner: MoeDeltaTuner,
    post_trained: str | Path | PreTrainedModel,
    *,
    scale: float | Mapping[str, float] = 1.0,
    expert_scale: ExpertScale = 1.0,
    validation: Validation | None = None,
    language: str | None = None,
    replicate_dense_layers: bool = False,
    remote_code: bool = False,
    architecture: str | None = None,
    serve_with: str | None = None,
    tolerance: float = 1e-4,
) -> PreTrainedModel:
    """A stand-alone model in a stock architecture, ready for `save_pretrained` and `push_to_hub`.

    Both bring the tokenizer and chat template of the post-trained model along, with the adapter's new tokens: its
    generation config does that, so a model that is given another one leaves the tokenizer to you.

    Args:
        tuner, post_trained, expert_scale, validation: as in `graft`; a loaded `post_trained` is left as it is.
        scale: `s`, the share of the post-training delta: a number, or `{pattern: number}` over parameter names.
        language: for routing by language, what that language runs on: a dense model where its group has at most one
            expert a layer, else a stock mixture of its group's experts.
        replicate_dense_layers: where no architecture keeps dense layers, write copies of their one expert; the report
            says what that costs.
        remote_code: where no stock architecture is exact (unequal experts a layer, other families, classifiers,
            attention experts, routing by language for all languages, which then takes `language_ids`), use the dense
            architecture with a small modelling file of its own, which is saved along and loads with
            `trust_remote_code=True`, without this package.
        architecture: the stock architecture to take, by its `model_type`; None for the first that is exact.
        serve_with: the engine that is to run it, one of `engines.ENGINES`: takes a form that it runs exactly, with
            copies of dense layers where that is the way, or says why there is none and what fits.
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
        architecture=architecture,
        serve_with=serve_with,
        tolerance=tolerance,
    )


def grafted_adapter(
    tuner: MoeDeltaTuner,
    post_trained: str | Path | PreTrainedModel,
    scale: Scale,
    expert_scale: ExpertScale,
    validation: Validation | None = None,
    *,
    warn: bool = True,
    meant: Collection[str] = (),
) -> PeftModel:
    """The experts over `W_0 + s (P - W_0)`; a loaded `post_trained` is changed in place. See `graft`.

    `meant`: doubts that are none, because the caller wants just that.
    """
    if (expert_scale == "auto") != (validation is not None):
        raise GraftError(
            f'expert_scale="auto" and `validation` go together; got expert_scale={expert_scale!r} and '
            f"validation={validation!r}. Pass a function that scores a grafted model, or a number."
        )
    name, config = tuner.active_adapters[0], tuner.peft_config[tuner.active_adapters[0]]
    check_has_delta(config)
    model = post_trained if isinstance(post_trained, PreTrainedModel) else _load(post_trained)
    # Trainer leaves its mixed precision on a model it has trained; exactness is a matter of the weights' own.
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model = model.to(next(tuner.model.parameters()).device)
    _check_siblings(tuner.model, model)
    base, after = Dense.of_model(tuner.model), Dense.of_model(model, copy=scale != Scale(1.0))
    weights = GraftedWeights(
        base, after, Adapter.of_model(tuner), scale, 1.0 if expert_scale == "auto" else expert_scale,
        match_vocabularies(str(tuner.model.name_or_path), base, str(model.name_or_path), after, config),
    )  # fmt: skip
    weights.check_finite()
    found = tuple(doubt for doubt in doubts(weights) if doubt not in meant)
    if warn:
        warn_of(found, stacklevel=5)
    if scale != Scale(1.0):
        _scale_dense(model, weights)
    weights.adapter_config.change(base_fingerprint=None, base_model_name_or_path=None)
    # The stage's frozen parts stay frozen: what may follow is a short review.
    grafted = get_peft_model(model, weights.adapter_config, name, autocast_adapter_dtype=False)
    if grafted.base_model.active_adapters != [name]:
        grafted.set_adapter(name)
    grafted.train(tuner.training)
    _fill(grafted, weights)
    trials: list[tuple[float, float]] = []
    if validation is not None:
        for share in EXPERT_SCALES:
            _fill(grafted, weights, share)
            trials.append((share, float(validation(grafted))))
        _fill(grafted, weights, max(trials, key=lambda trial: trial[1])[0])
    report = weights.report(str(model.name_or_path), found, tuple(trials))
    grafted.active_peft_config.change(graft=asdict(report))
    grafted.graft_report = report  # type: ignore[assignment]  # torch names only tensors and modules
    return grafted


def to_stock(
    model: PeftModel,
    *,
    language: str | None = None,
    replicate_dense_layers: bool = False,
    remote_code: bool = False,
    architecture: str | None = None,
    serve_with: str | None = None,
    tolerance: float = 1e-4,
) -> PreTrainedModel:
    """An upcycled model, grafted or not, as a stand-alone stock model; see `merge_and_graft`.

    The export is built and compared with the adapter in fp32, and then built in the dense model's own dtype.
    """
    graft, weights = _own_weights(model, language, remote_code)
    chosen = choose(
        weights,
        replicate_dense_layers=replicate_dense_layers,
        remote_code=remote_code,
        architecture=architecture,
        serve_with=serve_with,
    )
    in_fp32 = weights.dtype == torch.float32
    exact = model if in_fp32 else copy.deepcopy(model).float()
    exported = build_model(_own_weights(exact, language, remote_code)[1], chosen.layout)
    difference = compare_export(weights, exact, exported, language=language, tolerance=tolerance)
    if not in_fp32:
        exported = build_model(weights, chosen.layout)
    dense = tuner_of(model).model
    exported.generation_config = _generation_config(dense, graft.adapter_config.record)
    report = graft.adapter_config.record.graft or asdict(graft.report(str(dense.name_or_path)))
    found = {
        "layout": exported.config.model_type,
        "language": language,
        "max_logit_difference": difference,
        "replicated_bytes": weights.replicated_bytes if chosen.layout.replicates else 0,
        "route_agreement": None if in_fp32 else rounded_routes(weights, model, exported),
        "choice": explain_choice(weights, chosen, serve_with),
    }
    exported.graft_report = GraftReport(**(report | found))  # type: ignore[assignment]  # as above
    return exported.eval()


def _generation_config(dense: PreTrainedModel, record: AdapterRecord) -> GenerationConfig:
    """The dense model's, with its tokenizer where it has a name to find one by."""
    config, name = dense.generation_config, dense.name_or_path
    assert config is not None  # a causal LM has one
    if name is None or name in ("", "None"):  # what transformers calls a model made from a config, or from tensors
        return copy.deepcopy(config)
    return StockGenerationConfig.of(config, name, record)


def tuner_of(model: PeftModel) -> MoeDeltaTuner:
    """The upcycled model inside PEFT's wrapper, which calls it just a module."""
    return cast("MoeDeltaTuner", model.base_model)


def warn_of(found: tuple[str, ...], stacklevel: int) -> None:
    """Tell of a doubtful graft."""
    if found:
        warnings.warn(
            f"Grafting looks doubtful: {'; '.join(found)}. Score the result before you ship it.", stacklevel=stacklevel
        )


def _own_weights(model: PeftModel, language: str | None, remote_code: bool) -> tuple[GraftedWeights, UpcycledWeights]:
    """A model's own weights: a graft of nothing, in which everything is known and copied."""
    tuner = tuner_of(model)
    dense = Dense.of_model(tuner.model)
    graft = GraftedWeights(dense, dense, Adapter.of_model(tuner), Scale(0.0), 1.0, None)
    return graft, exported_share(graft.upcycled(), graft.adapter.config, language, remote_code=remote_code)


@torch.no_grad()
def _scale_dense(model: PreTrainedModel, weights: GraftedWeights) -> None:
    """`W_0 + s (P - W_0)` for every weight of the dense model, one that is tied no more as a weight of its own."""
    for name in weights.post_trained.tied.keys() - weights.tied.keys():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(weights.post_trained.tensors[name].clone()))
        model.config.tie_word_embeddings = False
    for name in weights.names:
        model.get_parameter_or_buffer(name).copy_(weights.dense_before_adapter(name))


def _fill(grafted: PeftModel, weights: GraftedWeights, share: float | None = None) -> None:
    """Give the grafted model its routers and experts, in the dtypes that they have in the adapter."""
    if share is not None:
        weights.expert_scales = scale_of_groups(weights.plan.groups[1:], share)
    tensors = {key: tensor.clone() for key, tensor in weights.adapter_tensors()}
    set_peft_model_state_dict(grafted, tensors, grafted.active_adapter, low_cpu_mem_usage=True)


def _check_siblings(base: PreTrainedModel, post_trained: PreTrainedModel) -> None:
    """Refuse a post-trained model that cannot be the base model's own.

    Raises:
        GraftError: another architecture, or no dense model.
    """
    check_same_kind(base.config.model_type, post_trained.config.model_type)
    if any(isinstance(module, MoeDeltaLayer) for module in post_trained.modules()):
        raise GraftError("The post-trained model is upcycled already. Pass the dense post-trained checkpoint.")


def _load(post_trained: str | Path) -> PreTrainedModel:
    """A dense checkpoint in its own dtype, its files checked first.

    Raises:
        CheckpointError: no such checkpoint, or a file of it is missing or damaged, or lacks weights.
    """
    folder = resolve(post_trained)
    Dense.of_folder(folder)
    model = load_causal_lm(folder, dtype="auto")
    model.name_or_path = str(post_trained)  # a Hub id stays one: the grafted adapter names it as its base
    return model
