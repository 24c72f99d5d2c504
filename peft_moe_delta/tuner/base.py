"""`MoeDeltaTuner`: what PEFT calls, and what everything above it asks of an upcycled model.

In: a causal LM and a `MoeDeltaConfig`. Out: the same model with `MoeDeltaLayer`s in place of MLP blocks, as PEFT's
tuners leave it. What a user does with it (stages, growing, grafting) is `peft_moe_delta/model.py`, above all of that.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, _get_tuner_state_dict_key_prefixes
from torch import Tensor, nn

from ..architectures import (
    OUTSIDE_THE_TEXT_DECODER,
    attention_module_name,
    check_floats,
    layer_index,
    mlp_module_name,
)
from ..errors import ArchitectureError, PlanError
from ..plan import ExpertPlan
from ..routing import routing_named
from .attention import MoeDeltaAttention
from .blocks import block_of, check_unadapted, hidden_size, mlp_blocks, upcycled
from .config import MoeDeltaConfig, check_one_active
from .context import ForwardContext
from .fingerprint import base_weights, check_fingerprint, fingerprint
from .grouped import GROUPED_MM, IMPLEMENTATIONS, grouped_mm
from .identifier import AUTO, Identifiers
from .layer import MERGE_REFUSED, MoeDeltaLayer
from .loading import AdapterLoad, check_complete, check_keys
from .optimizers import note_what_trains
from .processes import check_can_follow, is_stand_in, whole_tensors
from .settings import LayerSettings
from .vocabulary import GrownLayer, check_can_grow, grow, ungrow


class MoeDeltaTuner(BaseTuner):
    """An upcycled model as PEFT makes, saves, loads and switches it; `MoeDeltaModel` is what a user gets."""

    prefix: str = "moe_delta_"
    tuner_layer_cls = (MoeDeltaLayer, GrownLayer, Identifiers)  # type: ignore[assignment]  # PEFT asks isinstance of it
    peft_config: dict[str, MoeDeltaConfig]  # type: ignore[assignment]  # where the base class says PeftConfig
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]  # PEFT's lacks the ClassVar

    # -- what there is, and the language and routing in force ----------------------------------------------------------

    def set_language(self, code: str | None) -> None:
        """Set the language of calls that name none; None forgets it. An adapter that does not know it ignores it.

        `"auto"` has it read from the text, whatever the routing, by an adapter that has learnt to (`fit_identifier`).

        Raises:
            LanguageError: the active adapter does not know the language.
        """
        if code not in (None, AUTO):
            self.active_config.language_table.id_of(code)
        ForwardContext.of(self.model).language = code

    @contextmanager
    def in_language(self, code: str | None) -> Iterator[None]:
        """`set_language` for the length of a block."""
        context = ForwardContext.of(self.model)
        before = context.language
        self.set_language(code)
        try:
            yield
        finally:
            context.language = before

    @contextmanager
    def in_routing(self, routing: str) -> Iterator[None]:
        """Another routing for the active adapter, for the length of a block; what trains stays as it is.

        Raises:
            PlanError: unknown routing.
        """
        config, before = self.active_config, self.active_config.routing
        config.routing = routing_named(routing).name
        try:
            yield
        finally:
            config.routing = before

    def set_experts_implementation(self, implementation: str) -> None:
        """How a layer's experts run, as transformers' models have it.

        Args:
            implementation: `"eager"`, one after another, which is fastest on a CPU; or `"grouped_mm"`, as one grouped
                matrix product, for which the host never waits for the device. Code of `torch.compile` is always
                grouped where the experts can be: linear maps without hooks, in sizes of whole 16 bytes.

        Raises:
            PlanError: any other name, or a PyTorch without grouped products.
        """
        if implementation not in IMPLEMENTATIONS:
            raise PlanError(
                f"experts_implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}."
            )
        if implementation == GROUPED_MM and grouped_mm is None:
            raise PlanError(f'PyTorch {torch.__version__} has no grouped_mm. Use "eager", or a newer PyTorch.')
        ForwardContext.of(self.model).grouped = implementation == GROUPED_MM

    @property
    def active_config(self) -> MoeDeltaConfig:
        """The active adapter's configuration."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """The routers' loss of the last training pass where that pass returned no loss to add it to."""
        return ForwardContext.of(self.model).auxiliary

    def layers(self, adapter_name: str | None = None) -> dict[int, MoeDeltaLayer]:
        """Decoder layer index -> upcycled layer, for one adapter (default: the active one), ascending."""
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        found = {
            layer_index(key): module
            for key, module in self.model.named_modules()
            if isinstance(module, MoeDeltaLayer) and not module.is_attention and name in module.settings
        }
        return dict(sorted(found.items()))

    def expert_layers(self) -> Iterator[tuple[int, str, MoeDeltaLayer]]:
        """`(decoder layer index, module name in the dense model, module)` of all the active adapter's experts."""
        for name, module in self.model.named_modules():
            if isinstance(module, MoeDeltaLayer) and self.active_adapters[0] in module.settings:
                yield layer_index(name), name, module

    def plan(self, adapter_name: str | None = None) -> ExpertPlan:
        """The experts of an adapter (default: the active one) in the layers that have any."""
        layers = self.layers(adapter_name)
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        counts = tuple(layer.settings[name].counts for layer in layers.values())
        return ExpertPlan(tuple(layers), self.peft_config[name].language_table.groups, counts)

    # -- what PEFT calls ----------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        # What is filled in belongs to this model; the caller may use its configuration for another one.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        was_saved = self.peft_config[adapter_name].record.base_fingerprint is not None
        with ExitStack() as undo:
            undo.callback(self.peft_config.pop, adapter_name)  # transformers would leave a refused adapter listed
            self._state_dict_under_way = state_dict  # of which PEFT would only read where to go: the configuration says
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if self.peft_config[adapter_name].record.identifier is not None:
                Identifiers.enter(self.model, adapter_name, self.peft_config[adapter_name], self.active_adapters)
            if was_saved:  # its tensors are yet to come
                AdapterLoad.expect(self.model, adapter_name, self.peft_config[adapter_name].inference_mode)
            undo.pop_all()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        check_one_active(self.peft_config, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)
        note_what_trains(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        Identifiers.leave(self.model, adapter_name)
        if was_active and self.peft_config:
            # Each layer has chosen a successor among its own adapters, which need not be the same everywhere.
            self.set_adapter(min(self.peft_config))

    def _prepare_adapter_config(self, peft_config: MoeDeltaConfig, model_config: dict[str, Any]) -> MoeDeltaConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = [mlp_module_name(model_config.get("model_type", ""))]
            if peft_config.exclude_modules is None and model_config.get("text_config") is not None:
                peft_config.exclude_modules = OUTSIDE_THE_TEXT_DECODER
        return peft_config

    def _prepare_model(self, peft_config: MoeDeltaConfig, model: nn.Module) -> None:
        """Check everything before the first module is replaced, so that a refused model is left as it was."""
        if not hasattr(self.model, "config") or not hasattr(self.model.config, "get_text_config"):
            raise ArchitectureError(f"{type(self.model).__name__} has no transformers config; expected a causal LM.")
        check_can_follow(self.model, grows=bool(peft_config.record.new_tokens))
        blocks = mlp_blocks(self.model, peft_config)
        if peft_config.attention_experts is not None:
            attention = attention_module_name(self.model.config.model_type)
            for name in (f"{mlp.rpartition('.')[0]}.{attention}" for mlp, _ in blocks.values()):
                check_unadapted(name, block_of(self.model.get_submodule(name)))
                if peft_config.expert_rank is None:
                    check_floats(name, block_of(self.model.get_submodule(name)))
        if not blocks:
            return  # PEFT says which names it looked for
        layers = sorted(blocks)
        missing = set(peft_config.wanted_layers or ()) - set(layers)
        if missing:
            raise PlanError(
                f"`layers_to_transform` names the layers {sorted(missing)}, where {type(self.model).__name__} has no "
                f"module called {peft_config.target_modules}. It matches in the layers {layers}."
            )
        plan = peft_config.plan(layers)
        if self._state_dict_under_way is not None:
            wanted = {blocks[layer][0] for layer in plan.moe_layers}
            check_keys(self._state_dict_under_way, wanted, self.prefix)
        if peft_config.record.new_tokens:
            check_can_grow(self.model, peft_config)
        weights = base_weights(model)
        mlps = [
            {inner: f"{name}.{inner}" for inner, _ in block_of(block).named_parameters()}
            for name, block in (blocks[layer] for layer in layers)
        ]
        if (saved := peft_config.record.base_fingerprint) is not None:
            verified = peft_config.verify_base and not is_stand_in()
            check_fingerprint(saved, weights, mlps, verify_weights=verified)
        peft_config.change(base_fingerprint=fingerprint(weights, len(mlps)))
        self._plan_under_way = plan

    def _create_and_replace(
        self,
        peft_config: MoeDeltaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if peft_config.record.new_tokens:
            grow(self.model, adapter_name, peft_config)
        plan = self._plan_under_way
        layer = layer_index(current_key)
        if plan.num_experts(layer) == 1:
            return  # a dense layer stays the base model's own
        settings = LayerSettings.build(peft_config, plan.counts[plan.layers.index(layer)], layer)
        upcycled(self.model, current_key, target).add_experts(adapter_name, settings, hidden_size(self.model))
        if peft_config.attention_experts is not None:
            name = attention_module_name(self.model.config.model_type)
            attention = getattr(parent, name)
            if not isinstance(attention, MoeDeltaAttention):
                attention = MoeDeltaAttention(attention, ForwardContext.of(self.model))
                setattr(parent, name, attention)
            attention.add_experts(adapter_name, replace(settings, has_classifier=False), hidden_size(self.model))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSED)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the experts of two adapters serve other languages and have routers of their own."""
        raise NotImplementedError(
            "Adapters with experts cannot be added up: each has languages and routers of its own. Mix branches with "
            "`mix`, or teach one adapter further languages with add_languages(...)."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's arguments of a call; `adapter_names` would be dropped without a word.

        Raises:
            PlanError: the rows of a batch are to use different adapters.
        """
        if kwargs.get("adapter_names") is not None:
            raise PlanError(
                f"One adapter with experts serves a whole batch; got adapter_names={kwargs['adapter_names']!r}. Call "
                "set_adapter(...) and run the rows of each adapter by themselves."
            )
        yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        AdapterLoad.forget(self.model)
        Identifiers.leave(self.model)
        ForwardContext.of(self.model).detach(self.model)
        ungrow(self.model)
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """What `save_pretrained` writes of a state dict: as by default, but whole where it is on several processes."""
        return whole_tensors(model, state_dict, _get_tuner_state_dict_key_prefixes(model, adapter_name))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`...mlp.moe_delta_experts.<adapter>.0.up_proj.weight` -> the same without the adapter's name."""
        return re.sub(rf"({re.escape(cls.prefix)}[^.]+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeDeltaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT only warns of missing tensors; a router or expert left at its random start is an error here."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        AdapterLoad.forget(model)
        check_complete(model, adapter_name, set(model.state_dict()) - set(remapped))
        return remapped
