"""Growing: new languages for an adapter that is trained already, and taking a group away again.

In: an upcycled model and languages, some in groups that are new. Out: the same model with experts and router rows
appended, of which nothing that the earlier languages compute feels anything: their tokens cannot reach the new experts
before a review opens them (`routing/growth.py`), and what came earlier is frozen from then on. That is lifelong
expansion as in LayerMoE (arXiv 2505.22582), whose published code initialises the whole router anew, and DMoE's new
language (arXiv 2506.12388), whose expert starts from that of the most similar group.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from ..architectures import layer_index
from ..errors import LanguageError, PlanError
from ..languages import LanguageTable
from .base import MoeDeltaTuner
from .blocks import hidden_size, mlp_blocks, upcycled
from .config import MoeDeltaConfig
from .context import ForwardContext
from .experts import Experts
from .identifier import Identifiers
from .layer import MoeDeltaLayer
from .record import GrowthStep
from .settings import LayerSettings

StartFrom = str | Mapping[str, str] | None
"""The group whose experts the new ones start as, for all new groups or one each; None for expert 0."""

_ASKED = ("routing", "load_balancing_coef", "language_prior_coef", "language_prior_groups", "classifier_coef")
_RECORDED = ("stage", "train_earlier_rows", "open_steps")
"""What a growth step remembers of the time before it, for `remove_group`: of the config, and of its record."""


def add_languages(
    tuner: MoeDeltaTuner,
    languages: Mapping[str, str],
    experts: Mapping[str, int | Sequence[int]] | None = None,
    start_from: StartFrom = None,
) -> None:
    """Add languages to the active adapter; see `MoeDeltaModel.add_languages`."""
    name, config = tuner.active_adapters[0], tuner.active_config
    grown, sources = foreseen_growth(config, languages, experts, start_from)
    blocks = mlp_blocks(tuner.model, config)
    plan = grown.plan(sorted(blocks))  # refuses what does not fit before anything is changed
    before = {layer: found.settings[name].counts for layer, found in tuner.layers(name).items()}
    _take_over(config, grown)
    for layer in sorted(blocks):
        counts = plan.counts[plan.layers.index(layer)]
        path, block = blocks[layer]
        if sum(counts) == 1:
            continue  # stays dense
        if layer not in before:
            _upcycle(tuner, name, layer, path, block, counts)
        else:
            assert isinstance(block, MoeDeltaLayer)
            _append(block, name, LayerSettings.build(config, counts, layer), sources)
    tuner.set_adapter(tuner.active_adapters)


def foreseen_growth(
    config: MoeDeltaConfig,
    languages: Mapping[str, str],
    experts: Mapping[str, int | Sequence[int]] | None = None,
    start_from: StartFrom = None,
) -> tuple[MoeDeltaConfig, dict[int, int]]:
    """What an adapter's config becomes, and which groups' experts the new groups' start as, by index.

    Raises:
        LanguageError, PlanError: as `MoeDeltaModel.add_languages`, but for counts that do not fit the model's layers.
    """
    experts = dict(experts or {})
    _check_languages(config, languages, experts)
    return _grown_config(config, languages, experts), _sources(config, experts, start_from)


@torch.no_grad()
def remove_group(tuner: MoeDeltaTuner, group: str) -> None:
    """Take a group that was added away again; see `MoeDeltaModel.remove_group`."""
    name, config = tuner.active_adapters[0], tuner.active_config
    members = _check_removable(config, group)
    index = len(config.language_table.groups) - 1
    context = ForwardContext.of(tuner.model)
    if context.language in members:
        context.language = None
    Identifiers.forget(tuner.model, name, config, members)
    kept = _shrunk_config(config, group, members)
    _take_over(config, kept)
    for path, layer in [(p, m) for p, m in tuner.model.named_modules() if isinstance(m, MoeDeltaLayer)]:
        if name not in layer.settings:
            continue
        counts = layer.settings[name].counts[:index]
        if sum(counts) == 1:
            _make_dense(tuner, name, path, layer)
            continue
        layer.moe_delta_experts[name] = Experts(layer.experts(name)[1 : sum(counts)])
        layer.router(name).remove_rows(index)
        if (classifier := layer.classifier(name)) is not None:
            classifier.remove_rows(config.newest_step + 1)
        layer.settings[name] = LayerSettings.build(config, counts, layer_index(path))
    tuner.set_adapter(tuner.active_adapters)


# -- checks, before anything is changed -------------------------------------------------------------------------------


def _check_languages(
    config: MoeDeltaConfig, languages: Mapping[str, str], experts: Mapping[str, int | Sequence[int]]
) -> None:
    """Refuse names in use, and experts that do not go with new groups.

    Raises:
        LanguageError: malformed languages, or a language that the adapter knows already.
        PlanError: experts for a group that exists, a new group without experts, or an adapter that trains modules
            which every language shares.
    """
    table = config.language_table
    LanguageTable.build(languages)
    known = sorted(set(languages) & set(table.codes))
    if known:
        raise LanguageError(
            f"The adapter knows {', '.join(known)} already; its languages are {', '.join(table.codes)}. Add only new "
            "languages: a language stays in its group, whose experts were trained on it."
        )
    used = sorted(set(experts) & set(table.groups))
    if used:
        raise PlanError(
            f"`experts` gives counts to {', '.join(used)}, which the adapter has already: a group's experts are not "
            "added to. Choose a name that is not in use, or leave the group out of `experts` to let languages join it."
        )
    new = set(languages.values()) - set(table.groups)
    if new != set(experts):
        raise PlanError(
            f"`experts` names the groups {sorted(experts)}; `languages` brings the new groups {sorted(new)}. Give "
            f"every new group a count, and only those. Known groups, to join: {', '.join(table.groups)}."
        )
    if new and config.attention_experts is not None:
        raise PlanError(
            f"This adapter has attention experts (attention_experts={config.attention_experts!r}), which cannot be "
            "added to yet. Mix all languages at once, or grow an adapter with MLP experts alone."
        )
    if new and config.modules_to_save:
        raise PlanError(
            f"This adapter trains {config.modules_to_save} beside its experts. Every language runs through those, so "
            "training them for new languages would change the earlier ones. Grow an adapter without modules_to_save."
        )


def _sources(config: MoeDeltaConfig, experts: Mapping[str, Any], start_from: StartFrom) -> dict[int, int]:
    """New group's index -> index of the group whose experts its own start as.

    Raises:
        PlanError: an unknown group on either side.
    """
    groups = config.language_table.groups
    given = {group: start_from for group in experts} if isinstance(start_from, str) else dict(start_from or {})
    if not set(given) <= set(experts) or not set(given.values()) <= set(groups):
        raise PlanError(
            f"start_from={start_from!r} must name one of the groups {', '.join(groups)} for the new groups "
            f"{', '.join(experts) or '(there are none)'}. Leave it out to start from expert 0."
        )
    return {len(groups) + i: groups.index(given[g]) for i, g in enumerate(experts) if g in given}


def _check_removable(config: MoeDeltaConfig, group: str) -> tuple[str, ...]:
    """The languages that go with a group.

    Raises:
        PlanError: the group was not added by growing, or others came after it.
        LanguageError: languages of other groups came after its own, whose ids would change.
    """
    table = config.language_table
    grown = [g for step in config.record.growth for g in step.groups]
    if not grown or grown[-1] != group:
        raise PlanError(
            f"Only the group that was added last can be removed: {grown[-1] if grown else 'none was added'}; got "
            f"{group!r}. Later groups were trained beside the earlier ones: remove those first."
        )
    members = table.members(group)
    if table.codes[len(table.codes) - len(members) :] != members:
        raise LanguageError(
            f"Languages came after those of {group!r} ({', '.join(members)}): the ids are {', '.join(table.codes)}, "
            "and theirs would change. Load the adapter as it was saved before."
        )
    return members


# -- configurations ---------------------------------------------------------------------------------------------------


def _grown_config(config: MoeDeltaConfig, languages: Mapping[str, str], experts: dict[str, Any]) -> MoeDeltaConfig:
    record = config.record
    # Languages that join come first, so that those of a new group are last and can be taken away with it.
    order = sorted(languages, key=lambda code: languages[code] in experts)
    changes: dict[str, Any] = {
        "languages": {**config.languages, **languages},
        "language_ids": [*record.language_ids, *order],
        "experts": {**config.experts, **experts},
        "group_order": [*record.group_order, *experts],
    }
    if experts:
        before = {name: copy.deepcopy(getattr(config, name)) for name in _ASKED}
        before |= {name: getattr(record, name) for name in _RECORDED}
        changes["growth"] = [*record.growth, GrowthStep(tuple(experts), before)]
    return replace(config, **changes)


def _shrunk_config(config: MoeDeltaConfig, group: str, members: tuple[str, ...]) -> MoeDeltaConfig:
    *earlier, step = config.record.growth
    left = tuple(name for name in step.groups if name != group)
    changes: dict[str, Any] = {
        "languages": {code: g for code, g in config.languages.items() if code not in members},
        "language_ids": config.language_table.codes[: -len(members)],
        "experts": {g: counts for g, counts in config.experts.items() if g != group},
        "group_order": config.language_table.groups[:-1],
        "growth": [*earlier, replace(step, groups=left)] if left else earlier,
    }
    if not left:
        changes |= copy.deepcopy(step.before)
    elif config.language_prior_groups is not None:
        changes["language_prior_groups"] = [g for g in config.language_prior_groups if g != group]
    return replace(config, **changes)


def _take_over(config: MoeDeltaConfig, changed: MoeDeltaConfig) -> None:
    """Change a configuration in place: every layer holds it."""
    config.change(**{field.name: getattr(changed, field.name) for field in fields(changed)})


# -- layers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _append(layer: MoeDeltaLayer, name: str, grown: LayerSettings, sources: Mapping[int, int]) -> None:
    """Append the new groups' experts and rows to a layer that has some."""
    settings, experts, router = layer.settings[name], layer.moe_delta_experts[name], layer.router(name)
    assert isinstance(experts, nn.ModuleList)
    dtype, training, counts = next(experts.parameters()).dtype, layer.training, grown.counts
    if (classifier := layer.classifier(name)) is not None and len(counts) > len(settings.counts):
        classifier.add_rows(grown.config.newest_step, 1)
    for group in range(len(settings.counts), len(counts)):
        if not counts[group]:
            continue
        router.add_rows(group, counts[group])
        start_as = [e for e, owner in enumerate(grown.tables.owners) if e and owner == sources.get(group)]
        for i in range(counts[group]):
            new = layer.new_expert(settings.config).to(dtype).train(training)
            if start_as:
                new.load_state_dict(experts[start_as[i % len(start_as)] - 1].state_dict())
            experts.append(new)
    layer.settings[name] = grown


def _upcycle(tuner: MoeDeltaTuner, name: str, index: int, path: str, block: nn.Module, counts: tuple[int, ...]) -> None:
    """Experts for a layer that was dense under this adapter."""
    other = next(iter(tuner.layers(name).values()))
    dtype = next(other.moe_delta_experts[name].parameters()).dtype
    layer = upcycled(tuner.model, path, block)
    config = tuner.peft_config[name]
    layer.add_experts(name, LayerSettings.build(config, counts, index), hidden_size(tuner.model))
    if (classifier := layer.classifier(name)) is not None:
        classifier.recognise_all()  # as far as the earlier steps are concerned
        classifier.remove_rows(config.newest_step)
        classifier.add_rows(config.newest_step, 1)
    layer.moe_delta_experts[name].to(dtype)
    layer.train(other.training)


def _make_dense(tuner: MoeDeltaTuner, name: str, path: str, layer: MoeDeltaLayer) -> None:
    """Take an adapter off a layer in which it has no experts any more, and the layer away if it was the only one."""
    named = (*(getattr(layer, part) for part in layer.adapter_layer_names), layer.settings)
    for part in (*named, layer.frozen_peft_weight_names):
        if name in part:
            del part[name]
    if not layer.settings:
        parent, _, child = path.rpartition(".")
        setattr(tuner.model.get_submodule(parent), child, layer.base_layer)
