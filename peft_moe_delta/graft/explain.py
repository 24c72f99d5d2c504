"""What an adapter can be shipped as, and why, from configs alone: no weight is read.

In: an adapter's folder or Hub id. Out: one `Fit` for every form: stock architectures, what one language runs on, remote
code, the adapter itself; with what each engine does with it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NoReturn

from transformers import PretrainedConfig

from ..architectures import layer_index
from ..errors import CheckpointError, GraftError
from ..export import Fit, Layout, UpcycledWeights, choose, every_fit, with_engines
from ..export.names import DenseNames
from ..loading import load_adapter_config, load_config
from ..tuner.blocks import is_target
from ..tuner.config import MoeDeltaConfig
from .weights import upcycled_weights, why_not_encodable


def explain(adapter: str | Path, post_trained: str | Path | None = None) -> list[Fit]:
    """Every form the adapter could be shipped in, with the reasons why it does not fit.

    Args:
        adapter: folder or Hub id; its config is read.
        post_trained: the model it is to be grafted onto, whose config counts; None for the adapter's own base model.

    Raises:
        CheckpointError: no such adapter, another method's, or no such model.
    """
    config = adapter_config(adapter)
    try:
        base = load_config(str(post_trained or config.base_model_name_or_path))
    except CheckpointError as error:
        raise CheckpointError(f"{error} Another model can be named with --post-trained.") from error
    weights = weights_of(config, base)
    fits = every_fit(weights)
    if weights.languages is None:
        one = "every token may use every expert, whatever its language"
        fits.append(Fit("one language alone", Layout(), (one,)))
    else:
        table = weights.languages
        for group in table.groups:
            name = f'language="{" or ".join(table.members(group))}"' if table.members(group) else group
            try:
                share = weights.for_group(group)
                chosen = with_engines(share, choose(share))
                fits.append(dataclasses.replace(chosen, target=f"{name}: {chosen.target}"))
            except GraftError as error:
                fits.append(Fit(name, Layout(), (str(error),)))
    if reason := why_not_encodable(config):
        fits = [dataclasses.replace(fit, misfits=(reason,)) for fit in fits]
    return [*fits, Fit("adapter over the post-trained model (graft)", Layout())]


def adapter_config(adapter: str | Path) -> MoeDeltaConfig:
    """The config of an adapter of this package.

    Raises:
        CheckpointError: no such adapter, or another method's.
    """
    config = load_adapter_config(adapter)
    if not isinstance(config, MoeDeltaConfig):
        raise CheckpointError(f"{str(adapter)!r} is an adapter of {config.peft_type}, not of this package.")
    return config


def weights_of(config: MoeDeltaConfig, base: PretrainedConfig) -> UpcycledWeights:
    """The model that a configuration upcycles a base model to, as names and shapes.

    Raises:
        CheckpointError: the config describes no model.
        PlanError: the experts or gates do not fit the model's layers.
    """
    model = DenseNames(base).model
    targets = [module for module, _ in model.named_modules() if is_target(config, module)]
    return upcycled_weights(
        base,
        config,
        config.plan(sorted(map(layer_index, targets))),
        model.state_dict(),
        experts=_no_weights,
        routers=_no_weights,
        classifiers=dict.fromkeys(config.classifier_layers or (), _no_weights),
        attention_experts=_no_weights,
        attention_routers=_no_weights,
    )


def _no_weights(*_: int) -> NoReturn:
    raise AssertionError("explaining reads configs only")
