"""Out of PEFT: an upcycled model, grafted or not, as a stand-alone model that loads without this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ...delta import Scale
from ...errors import GraftError
from ...export import AttentionWeights, ReplicatedLayout, UpcycledWeights, build_model, choose, explain_choice
from ...routing import ClassifierRouting
from ..attention import MoeDeltaAttention
from ..comparison import compare_export, rounded_routes
from ..config import MoeDeltaConfig
from ..router import Router
from .adapter import Validation, grafted_adapter
from .report import GraftReport, new_tokens_of
from .weights import config_in_force, trained_weights, tuner_of

if TYPE_CHECKING:
    from ..model import MoeDeltaModel


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
        remote_code: where no stock architecture is exact (unequal experts a layer, other families, classifiers,
            attention experts, routing by language for all languages, which then takes `language_ids`), use the dense
            architecture with a small modelling file of its own, which is saved along and loads with
            `trust_remote_code=True`, without this package.
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
    tuner = tuner_of(model)
    weights = _weights(tuner, language, remote_code)
    chosen = choose(weights, replicate_dense_layers=replicate_dense_layers, remote_code=remote_code)
    in_fp32 = weights.dtype == torch.float32
    exact = model if in_fp32 else copy.deepcopy(model).float()
    exported = build_model(_weights(tuner_of(exact), language, remote_code), chosen.layout)
    difference = compare_export(weights, exact, exported, language=language, tolerance=tolerance)
    if not in_fp32:
        exported = build_model(weights, chosen.layout)
    exported.generation_config = copy.deepcopy(tuner.model.generation_config)
    config = tuner.active_config
    report = config.graft or asdict(GraftReport(str(tuner.model.name_or_path), 0.0, {}, **new_tokens_of(config)))
    found = {
        "layout": exported.config.model_type,
        "language": language,
        "max_logit_difference": difference,
        "replicated_bytes": weights.replicated_bytes if isinstance(chosen.layout, ReplicatedLayout) else 0,
        "route_agreement": None if in_fp32 else rounded_routes(weights, model, exported),
        "choice": explain_choice(weights, chosen),
    }
    exported.graft_report = GraftReport(**(report | found))  # type: ignore[assignment]  # torch names only tensors and modules
    return exported.eval()


def _weights(tuner: MoeDeltaModel, language: str | None, remote_code: bool) -> UpcycledWeights:
    """What is exported of a model in memory."""
    name, config, layers = tuner.active_adapters[0], tuner.active_config, tuner.layers()
    gates = {n: gate for n, layer in layers.items() if (gate := layer.classifier(name)) is not None}
    weights = UpcycledWeights(
        config=config_in_force(tuner),
        plan=tuner.plan(),
        top_k=config.experts_per_token,
        dense=trained_weights(tuner),
        experts=lambda layer, expert: layers[layer].expert_weights(name, expert),
        routers=lambda layer: _rows(layers[layer].router(name)),
        classifiers={n: partial(_rows, gate) for n, gate in gates.items()},
        attention=_attention_weights(tuner),
    )
    return exported_share(weights, config, language, remote_code=remote_code)


def _rows(router: Router) -> Tensor:
    return router.rows.detach()


def _attention_weights(tuner: MoeDeltaModel) -> AttentionWeights | None:
    name, kind = tuner.active_adapters[0], tuner.active_config.attention_experts
    if kind is None:
        return None
    found = {n: layer for n, _, layer in tuner.expert_layers() if isinstance(layer, MoeDeltaAttention)}
    return AttentionWeights(
        kind,
        experts=lambda layer, expert: found[layer].expert_weights(name, expert),
        routers=lambda layer: _rows(found[layer].router(name)),
    )


def exported_share(
    weights: UpcycledWeights, config: MoeDeltaConfig, language: str | None, *, remote_code: bool = False
) -> UpcycledWeights:
    """What is exported, of weights that know all of an adapter: the group's share that a language runs on, or all.

    Raises:
        GraftError: no stock architecture can say how this adapter routes; or a language is missing, or given where
            routing does not ask for one.
    """
    table = config.language_table
    weights = replace(weights, renormalise=config.norm_topk_prob)
    if not isinstance(config.routing_rule, ClassifierRouting):
        weights = replace(weights, classifiers={})
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
    if not config.routing_rule.needs_language and config.open_steps < config.newest_step:
        groups = zip(config.language_table.groups, config.steps, strict=True)
        closed = [group for group, step in groups if step > config.open_steps]
        return (
            f"The experts of {', '.join(closed)} are not open to every language yet, which no stand-alone model can "
            "say. Train the new groups' rows first: start_review(), then a short training on all languages."
        )
    return None
