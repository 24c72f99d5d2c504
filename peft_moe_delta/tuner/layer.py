"""`MoeDeltaLayer`: a decoder layer's MLP and the experts that grew beside it.

In: the hidden states the MLP would have received. Out: `y_t = sum_j w_tj Expert_{i_tj}(x_t)`, where expert 0 is the MLP
itself, unchanged and frozen.

Shape legend: T tokens, D hidden size, E experts, K chosen experts a token, S sets of experts (`allowed_SE`) or growth
steps (of gates, `gate_TS`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..architectures import takes_residual
from ..matrices import fewest_rows
from ..routing import Routes, choose_experts, recognised
from .config import MoeDeltaConfig, check_one_active
from .context import ForwardContext
from .deposits import Deposits
from .dispatch import Dispatch, weighs, with_idle
from .experts import (
    Experts,
    arriving_together,
    expert_weights,
    full_expert,
    hooked,
    input_dtype,
    low_rank_expert,
    parameters_of,
    take_shards,
)
from .grouped import GroupedExperts, can_be_grouped
from .lean import can_be_lean, run_lean
from .passes import ForwardState, Reach
from .processes import gathered, is_sharded, parallel, shard_with
from .router import Classifier, Router
from .settings import LayerSettings

EXPERTS, ROUTER, CLASSIFIER = "moe_delta_experts", "moe_delta_router", "moe_delta_classifier"


class Parts(NamedTuple):
    """What trains of an adapter in a layer."""

    experts: Experts
    router: Router
    classifier: Classifier | None


class MoeDeltaLayer(nn.Module, BaseTunerLayer):
    """An MLP with experts, for one or more adapters. Parameters are in `moe_delta_{experts,router,classifier}`."""

    _z3_leaf = True
    """DeepSpeed's ZeRO-3 gathers the layer's parameters as one, and puts no hooks on what is inside."""

    adapter_layer_names = (EXPERTS, ROUTER, CLASSIFIER)
    other_param_names = ("settings",)
    is_attention: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module, context: ForwardContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.moe_delta_experts = nn.ModuleDict()
        self.moe_delta_router = nn.ModuleDict()
        self.moe_delta_classifier = nn.ModuleDict()
        self.settings: dict[str, LayerSettings] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._takes_residual = self.calling_convention(base_layer)
        self._lean = not self._takes_residual and can_be_lean(base_layer)

    calling_convention = staticmethod(takes_residual)
    """Whether the module adds the residual itself."""

    def add_experts(self, adapter_name: str, settings: LayerSettings, hidden_size: int) -> None:
        """Grow an adapter's experts and router beside the MLP."""
        counts, steps = settings.counts, settings.config.steps
        with gathered(self.base_layer.parameters()):
            new = [self.new_expert(settings.config) for _ in range(sum(counts) - 1)]
        begun_with = sum(count for count, step in zip(counts, steps, strict=True) if step == 0)
        router = Router(hidden_size, begun_with, next(self.base_layer.parameters()).device)
        for group, (count, step) in enumerate(zip(counts, steps, strict=True)):
            if count and step > 0:
                router.add_rows(group, count)
        self.moe_delta_experts[adapter_name] = Experts(new)
        self.moe_delta_router[adapter_name] = router
        if settings.has_classifier:
            classifier = Classifier(hidden_size, router.weight.device)
            for step in range(1, settings.config.newest_step + 1):
                classifier.add_rows(step, 1)
            self.moe_delta_classifier[adapter_name] = classifier
        self.settings[adapter_name] = settings
        self.set_adapter(self.active_adapters, inference_mode=settings.config.inference_mode)
        if is_sharded(next(self.base_layer.parameters())):
            shard_with(self.base_layer, self)
            for expert in new:
                take_shards(expert, self.base_layer)

    def new_expert(self, config: MoeDeltaConfig) -> nn.Module:
        """An expert that computes what the MLP computes: a full copy, or a low-rank change of it."""
        rank = config.expert_rank
        return full_expert(self.base_layer) if rank is None else low_rank_expert(self.base_layer, rank)

    def experts(self, adapter_name: str) -> list[nn.Module]:
        """All experts of an adapter, expert 0 first."""
        return [self.base_layer, *self.new_experts(adapter_name)]

    def new_experts(self, adapter_name: str) -> Experts:
        """An adapter's experts without expert 0, as the one module that they run as."""
        new = self.moe_delta_experts[adapter_name]
        assert isinstance(new, Experts)
        return new

    def router(self, adapter_name: str) -> Router:
        """An adapter's router."""
        router = self.moe_delta_router[adapter_name]
        assert isinstance(router, Router)
        return router

    def classifier(self, adapter_name: str) -> Classifier | None:
        """An adapter's gate; None where this layer has none."""
        if adapter_name not in self.moe_delta_classifier:
            return None
        classifier = self.moe_delta_classifier[adapter_name]
        assert isinstance(classifier, Classifier)
        return classifier

    def expert_weights(self, adapter_name: str, expert: int) -> dict[str, Tensor]:
        """An expert's weights under the MLP's parameter names, low-rank ones summed up."""
        return dict(expert_weights(self.experts(adapter_name)[expert], self.base_layer))

    @property
    def in_force(self) -> str | None:
        """The active adapter, where it has experts here."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.settings), None)

    def has_choice(self, adapter_name: str, x_TD: Tensor) -> bool:
        """Whether the tokens of the forward pass under way may use more than one expert."""
        return len(self._reach(self.context.state(len(x_TD), False), adapter_name, x_TD).usable) > 1

    def routes(self, adapter_name: str, x_TD: Tensor) -> Routes:
        """Where tokens go, of all the adapter's experts; the forward pass under way knows their languages."""
        reach = self._reach(self.context.state(len(x_TD), False), adapter_name, x_TD)
        sets_T, _ = self._sets(reach, adapter_name, self._gate(adapter_name, x_TD))
        config = self.settings[adapter_name].config
        return choose_experts(self.router(adapter_name)(x_TD), config.experts_per_token, reach.allowed(sets_T))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        name = self.in_force
        if name is None:
            return self.base_layer(x, residual) if self._takes_residual else self.base_layer(x)
        y = self._mixture(x.reshape(-1, x.shape[-1]), name).view(x.shape)
        if not self._takes_residual:
            return y
        assert residual is not None  # such an MLP is never called without
        return residual + y

    def _mixture(self, x_TD: Tensor, name: str) -> Tensor:
        # Router, gate, expert 0, new experts: hooks see each called in every pass or in none, whatever the batch holds,
        # so that processes whose batches differ run the same modules in the same order.
        settings = self.settings[name]
        parts = self._parts(name)
        state = self.context.state(len(x_TD), self.training)
        state.expect(settings.losses, x_TD.device)
        reach = self._reach(state, name, x_TD)
        logits_TE = parts.router(x_TD) if settings.calls_router else None
        gate_TS = parts.classifier(x_TD) if parts.classifier is not None and settings.classifies else None
        records = state.recording and (len(reach.usable) > 1 or settings.needs_logits)
        sets_T, allowed_SE, routes = None, reach.allowed_SE, None
        if reach.forced is None or records:
            sets_T, allowed_SE = self._sets(reach, name, gate_TS)
        if reach.forced is None:
            assert logits_TE is not None  # there is a choice
            routes = self._choose(settings, reach, logits_TE, reach.allowed(sets_T), records)
        if records:
            made = reach.forced_routes if routes is None else routes
            deposit = Deposits(self.context, settings, state, reach.groups)
            deposit.of_routes(made, sets_T, allowed_SE)
            if logits_TE is not None:
                deposit.of_logits(logits_TE)
            if gate_TS is not None and settings.config.classifier_loss > 0:
                deposit.of_gate(gate_TS)
        dispatch = reach.forced
        if dispatch is None:
            assert routes is not None
            dispatch = Dispatch.of(routes.indices_TK, routes.probabilities_TE.shape[1], on_device=state.on_device)
        experts = [self.base_layer, *parts.experts]
        if dispatch.ends_E is not None and not can_be_grouped(experts):
            dispatch = dispatch.on_host()
        used: Container[int] = ()
        if dispatch.ends_E is not None:
            used, outputs = range(len(dispatch.ends_E)), [self._run_as_one(experts, dispatch, x_TD)]
        else:
            used = inputs = dispatch.rows(x_TD)
            outputs = self._run_all(inputs, x_TD, parts.experts)
        y_TD = dispatch.combine(outputs, x_TD, routes)
        if not self._needs_idle(reach, y_TD):
            return y_TD
        balances = routes is not None and settings.config.load_balancing > 0
        taught = records and (settings.tables.logit_losses or balances)
        router = None if taught or (routes is not None and weighs(routes)) else parts.router
        gate = None if records and gate_TS is not None else parts.classifier
        if parallel():
            # Engines that shard go by what a layer's output depends on, which must not depend on the batch.
            router, gate = parts.router, parts.classifier
        return with_idle(y_TD, self._idle(used, parts.experts, (router, gate)))

    def _parts(self, name: str) -> Parts:
        """What of an adapter trains here, for one pass."""
        parts = self.new_experts(name), self.router(name), self.classifier(name)
        return Parts(*(arriving_together(parts) if parallel() else parts))

    @staticmethod
    def _choose(
        settings: LayerSettings, reach: Reach, logits_TE: Tensor, allowed_TE: Tensor | None, records: bool
    ) -> Routes:
        """The tokens' choice, in a pass in which they have one."""
        last = reach.usable[-1] + 1
        if not records and last < logits_TE.shape[1]:
            # What nobody here may use takes no part at all: the sums are the same, bit for bit, as before it was added.
            logits_TE, allowed_TE = logits_TE[:, :last], None if allowed_TE is None else allowed_TE[:, :last]
        config = settings.config
        return choose_experts(logits_TE, config.experts_per_token, allowed_TE, renormalise=config.norm_topk_prob)

    def _run_all(self, inputs: dict[int, Tensor], x_TD: Tensor, experts: Experts) -> list[Tensor]:
        """What the experts with rows make of them, by index."""
        new = {index: rows for index, rows in inputs.items() if index}
        outputs = []
        if 0 in inputs:
            outputs.append(self._run(0, self.base_layer, inputs[0]))
        elif parallel() or hooked(self.base_layer):
            # Whoever is told of expert 0's call, or shards its parameters, is told in every pass.
            self._run(0, self.base_layer, x_TD[: fewest_rows(self.base_layer)])
        return [*outputs, *experts(new, self._run).values()]

    def _run_as_one(self, experts: Sequence[nn.Module], dispatch: Dispatch, x_TD: Tensor) -> Tensor:
        """What the experts make of their rows, (R, D), in one product for each matrix."""
        assert dispatch.token_R is not None and dispatch.ends_E is not None
        grouped = GroupedExperts(experts[: len(dispatch.ends_E)], dispatch.ends_E, len(dispatch.token_R))
        x_RD = x_TD.index_select(0, dispatch.token_R)
        return grouped.run(x_RD, takes_residual=self._takes_residual, lean=self._lean).to(x_TD.dtype)

    @staticmethod
    def _needs_idle(reach: Reach, y_TD: Tensor) -> bool:
        """Whether parameters without tokens get a gradient of zero rather than none.

        DDP needs one for each; and a batch that nothing trains on, such as one of English alone, needs any at all.
        """
        if not torch.is_grad_enabled():
            return False
        return parallel() or len(reach.usable) > 1 or not y_TD.requires_grad

    def _idle(self, used: Container[int], experts: Experts, others: Iterable[nn.Module | None] = ()) -> list[Tensor]:
        """Parameters of experts without tokens, and of other modules that take no part."""
        idle = [expert for index, expert in enumerate([self.base_layer, *experts]) if index not in used]
        return [p for module in (*idle, *others) if module is not None for p in parameters_of(module)]

    def _reach(self, state: ForwardState, name: str, x_TD: Tensor) -> Reach:
        """Which experts the tokens of a pass may use, before any gate."""
        return state.reach(self.settings[name].tables, len(x_TD), x_TD.device)

    def _gate(self, name: str, x_TD: Tensor) -> Tensor | None:
        """The gate's logits, one a growth step; None where it is not in use."""
        classifier = self.classifier(name) if self.settings[name].classifies else None
        return None if classifier is None else classifier(x_TD)

    def _sets(self, reach: Reach, name: str, gate_TS: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """(T,) the set of experts that each token may use, None where all may use all, and the (S, E) sets.

        One set a group; and one more, expert 0 alone, for what the gate takes for an original language.
        """
        settings, tables, sets_T = self.settings[name], self.settings[name].tables, reach.sets_T
        if gate_TS is None or sets_T is None:
            if not tables.restricted:
                return None, reach.allowed_SE[:1]
            return sets_T, reach.allowed_SE[: len(tables.allowed)]
        original_T = recognised(gate_TS[:, : 1 + settings.config.record.open_steps])
        # The gate of a growth step that no review has opened knows nothing, but its languages are none of the original.
        if any(tables.closed):
            original_T = original_T & ~tables.tensor("closed", original_T.device)[sets_T]
        sets_T = sets_T.masked_fill(original_T, len(tables.allowed))
        return sets_T, reach.allowed_SE

    def _run(self, index: int, expert: nn.Module, x_TD: Tensor) -> Tensor:
        """One expert on its tokens, in its own dtype (new experts are fp32 by PEFT's default), back in the input's."""
        dtype = x_TD.dtype
        if not torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(input_dtype(expert) or dtype)
        if self._lean:
            y_TD = run_lean(expert, x_TD)
        else:
            y_TD = expert(x_TD, torch.zeros_like(x_TD)) if self._takes_residual else expert(x_TD)
        return y_TD.to(dtype)

    # What PEFT's base class assumes of a leaf layer with one weight, said for an MLP block.

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter; only what its stage trains gets gradients."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one_active(self.settings, names)
        for name, settings in self.settings.items():
            frozen = (EXPERTS,) if settings.config.record.stage == "review" else ()
            if not settings.classifies or settings.config.classifier_loss == 0:
                frozen = (*frozen, CLASSIFIER)
            self.frozen_peft_weight_names[name] = frozen if settings.tables.uses_router else (*frozen, ROUTER)
        super().set_adapter(names, inference_mode=inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT calls this on every road that switches gradients on.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or list(self.settings)
        for name in names:
            settings = self.settings.get(name)
            if settings is None or all(settings.tables.trained_groups):
                continue
            trained = settings.tables.trained_groups
            for expert, group in zip(self.experts(name), settings.tables.owners, strict=True):
                if not trained[group]:
                    expert.requires_grad_(False)
            if settings.config.record.train_earlier_rows:
                continue
            self.router(name).freeze_all_but(trained)
            if (classifier := self.classifier(name)) is not None:
                newest = settings.config.newest_step
                classifier.freeze_all_but([step == newest for step in range(newest + 1)])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.settings:
            return
        for container in (self.moe_delta_experts, self.moe_delta_router, self.moe_delta_classifier):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device or next(self.base_layer.parameters()).device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge(self) -> None:
        raise NotImplementedError(MERGE_REFUSED)


MERGE_REFUSED = (
    "A mixture of experts cannot be folded into one dense MLP: which expert serves a token depends on the token. "
    "Use merge_and_graft(post_trained) for a stand-alone model, with language=... for the dense model of one language."
)
