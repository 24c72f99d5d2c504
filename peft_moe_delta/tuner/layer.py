"""`MoeDeltaLayer`: a decoder layer's MLP and the experts that grew beside it.

In: the hidden states the MLP would have received. Out: `y_t = sum_j w_tj Expert_{i_tj}(x_t)`, where expert 0 is the MLP
itself, unchanged and frozen.

Shape legend: T tokens, D hidden size, E experts, K chosen experts a token, G language groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..architectures import takes_residual
from ..errors import LanguageError, PlanError
from ..losses import classifier_loss, language_prior_loss, load_balancing_loss, router_z_loss
from ..routing import Routes, choose_experts
from .config import MoeDeltaConfig
from .context import ForwardContext, ForwardState, constant
from .experts import expert_weights, full_expert, low_rank_expert
from .router import Classifier, Router
from .settings import LayerSettings

EXPERTS, ROUTER, CLASSIFIER = "moe_delta_experts", "moe_delta_router", "moe_delta_classifier"


class MoeDeltaLayer(nn.Module, BaseTunerLayer):
    """An MLP with experts, for one or more adapters. Parameters are in `moe_delta_{experts,router,classifier}`."""

    adapter_layer_names = (EXPERTS, ROUTER, CLASSIFIER)
    other_param_names = ("settings",)

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

    calling_convention = staticmethod(takes_residual)
    """Whether the module adds the residual itself."""

    def add_experts(self, adapter_name: str, settings: LayerSettings, hidden_size: int) -> None:
        """Grow an adapter's experts and router beside the MLP."""
        counts, steps = settings.counts, settings.config.steps
        new = [self.new_expert(settings.config) for _ in range(sum(counts) - 1)]
        begun_with = sum(count for count, step in zip(counts, steps, strict=True) if step == 0)
        router = Router(hidden_size, begun_with, next(self.base_layer.parameters()).device)
        for group, (count, step) in enumerate(zip(counts, steps, strict=True)):
            if count and step > 0:
                router.add_rows(group, count)
        self.moe_delta_experts[adapter_name] = nn.ModuleList(new)
        self.moe_delta_router[adapter_name] = router
        if settings.has_classifier:
            classifier = Classifier(hidden_size, router.weight.device)
            for step in range(1, settings.config.newest_step + 1):
                classifier.add_rows(step, 1)
            self.moe_delta_classifier[adapter_name] = classifier
        self.settings[adapter_name] = settings
        self.set_adapter(self.active_adapters, inference_mode=settings.config.inference_mode)

    def new_expert(self, config: MoeDeltaConfig) -> nn.Module:
        """An expert that computes what the MLP computes: a full copy, or a low-rank change of it."""
        rank = config.expert_rank
        return full_expert(self.base_layer) if rank is None else low_rank_expert(self.base_layer, rank)

    def experts(self, adapter_name: str) -> list[nn.Module]:
        """All experts of an adapter, expert 0 first."""
        new = self.moe_delta_experts[adapter_name]
        assert isinstance(new, nn.ModuleList)
        return [self.base_layer, *new]

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
        settings = self.settings[adapter_name]
        groups = self.context.state(len(x_TD), False).groups(settings.table, x_TD.device)
        return sum(settings.usable(None if groups is None else groups[1])) > 1

    def routes(self, adapter_name: str, x_TD: Tensor) -> Routes:
        """Where tokens go, of all the adapter's experts; the forward pass under way knows their languages."""
        settings = self.settings[adapter_name]
        groups = self.context.state(len(x_TD), False).groups(settings.table, x_TD.device)
        sets_T, allowed = self._sets(settings, groups, x_TD, adapter_name)
        allowed_TE = None if sets_T is None else constant(allowed, x_TD.device)[sets_T]
        return choose_experts(self.router(adapter_name)(x_TD), settings.config.experts_per_token, allowed_TE)

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
        settings, experts = self.settings[name], self.experts(name)
        state = self.context.state(len(x_TD), self.training)
        state.layers += 1
        groups = self._groups(settings, state, x_TD.device)
        usable = settings.usable(None if groups is None else groups[1])
        only = usable.index(True) if sum(usable) == 1 else None
        if only is not None and not (state.recording and settings.needs_logits):
            return self._run_alone(experts, only, x_TD, name)
        logits_TE = self.router(name)(x_TD)
        sets_T, allowed = self._sets(settings, groups, x_TD, name)
        allowed_TE = None if sets_T is None else constant(allowed, x_TD.device)[sets_T]
        if not state.recording and not usable[-1]:
            # What nobody here may use takes no part at all: the sums are the same, bit for bit, as before it was added.
            reach = len(usable) - usable[::-1].index(True)
            experts, logits_TE = experts[:reach], logits_TE[:, :reach]
            allowed_TE = None if allowed_TE is None else allowed_TE[:, :reach]
        routes = choose_experts(
            logits_TE, settings.config.experts_per_token, allowed_TE, renormalise=settings.config.norm_topk_prob
        )
        if state.recording:
            self._record(settings, state, logits_TE, routes, groups, sets_T, allowed)
            if settings.classifies and settings.config.classifier_loss > 0:
                self._record_classifier(settings, state, x_TD, groups, name)
        return self._combine(experts, x_TD, routes)

    @staticmethod
    def _groups(
        settings: LayerSettings, state: ForwardState, device: torch.device
    ) -> tuple[Tensor, frozenset[int]] | None:
        """Group of every token and the groups that occur; None where no language is known and none is needed."""
        groups = state.groups(settings.table, device)
        if groups is None and settings.config.routing_rule.needs_language:
            raise LanguageError(
                f"Routing {settings.config.routing!r} needs the language of every token, and none was given. Known "
                f"languages: {', '.join(settings.table.codes)}. Pass `language_ids` (LanguageCollator adds them) or "
                '`language="..."` with the call; a PeftModel also takes a default, model.set_language("...").'
            )
        return groups

    def _sets(
        self, settings: LayerSettings, groups: tuple[Tensor, frozenset[int]] | None, x_TD: Tensor, name: str
    ) -> tuple[Tensor | None, tuple[tuple[bool, ...], ...]]:
        """(T,) the set of experts that each token may use, None where all may use all, and the (S, E) sets.

        One set a group; and one more, expert 0 alone, for what the gate takes for an original language.
        """
        allowed = settings.allowed
        if not settings.restricted and not settings.classifies:
            return None, allowed[:1]
        sets_T = x_TD.new_zeros(len(x_TD), dtype=torch.int64) if groups is None else groups[0]
        classifier = self.classifier(name)
        if not settings.classifies or classifier is None:
            return sets_T, allowed
        original_T = classifier.recognises(x_TD, settings.config.open_steps)
        # The gate of a growth step that no review has opened knows nothing, but its languages are none of the original.
        closed = tuple(int(step > settings.config.open_steps) for step in settings.config.steps)
        if any(closed):
            original_T = original_T & (constant(closed, x_TD.device)[sets_T] == 0)
        alone = tuple(expert == 0 for expert in range(len(settings.owners)))
        return sets_T.masked_fill(original_T, len(allowed)), (*allowed, alone)

    def _run_alone(self, experts: list[nn.Module], expert: int, x_TD: Tensor, name: str) -> Tensor:
        y_TD = self._run(experts[expert], x_TD)
        if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
            # DDP waits for every trainable parameter: idle experts, router and gate take part with no tokens.
            idle = [self._run(e, x_TD[:0]).sum() for i, e in enumerate(experts) if i != expert and trainable(e)]
            for part in (self.router(name), self.classifier(name)):
                if part is not None and trainable(part):
                    idle.append(part(x_TD[:0]).sum())
            y_TD = y_TD + sum(idle)
        return y_TD

    def _combine(self, experts: list[nn.Module], x_TD: Tensor, routes: Routes) -> Tensor:
        """Sort the choices by expert once, run every expert on its slice, put the rows back and sum."""
        num_tokens, top_k = routes.indices_TK.shape
        chosen = routes.indices_TK.reshape(-1)
        order = chosen.argsort(stable=True)
        # The host must know the slices: the one sync of this layer.
        counts = chosen.bincount(minlength=len(experts) + 1).tolist()[: len(experts)]
        used = order[: sum(counts)]
        slices = x_TD.index_select(0, used // top_k).split(counts)
        # In training an expert without tokens runs too: its gradient is then zero, not missing, as DDP needs.
        outputs = [
            self._run(expert, rows)
            for expert, rows in zip(experts, slices, strict=True)
            if len(rows) or (torch.is_grad_enabled() and trainable(expert))
        ]
        rows = torch.cat(outputs) if outputs else x_TD  # no token, no output
        if len(used) == len(chosen):
            place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            y_TKD = rows.index_select(0, place)
        else:
            y_TKD = rows.new_zeros(len(chosen), rows.shape[-1]).index_copy(0, used, rows)
        if top_k == 1 and routes.normalised:
            return y_TKD  # a single weight is 1
        y_TKD = y_TKD.view(num_tokens, top_k, y_TKD.shape[-1])
        return (y_TKD * routes.weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)

    def _run(self, expert: nn.Module, x_TD: Tensor) -> Tensor:
        """One expert on its tokens, in its own dtype (new experts are fp32 by PEFT's default), back in the input's."""
        dtype = x_TD.dtype
        if not torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(next(expert.parameters()).dtype)
        y_TD = expert(x_TD, torch.zeros_like(x_TD)) if self._takes_residual else expert(x_TD)
        return y_TD.to(dtype)

    def _record(
        self,
        settings: LayerSettings,
        state: ForwardState,
        logits_TE: Tensor,
        routes: Routes,
        groups: tuple[Tensor, frozenset[int]] | None,
        sets_T: Tensor | None,
        allowed: tuple[tuple[bool, ...], ...],
    ) -> None:
        """Deposit this layer's auxiliary losses and statistics."""
        config, context, device = settings.config, self.context, logits_TE.device
        counted_T = state.counted(logits_TE)
        group_T = torch.zeros(len(logits_TE), dtype=torch.int64, device=device) if groups is None else groups[0]
        balance, balanced = load_balancing_loss(
            probabilities_TE=routes.probabilities_TE,
            indices_TK=routes.indices_TK,
            sets_T=torch.zeros_like(group_T) if sets_T is None else sets_T,
            allowed_SE=constant(allowed, device),
            counted_T=counted_T,
        )
        context.record("load_balancing_loss", balance, balanced)
        total = config.load_balancing * balance
        total = total + self._logit_losses(settings, logits_TE, counted_T, groups)
        state.losses.append((total, counted_T.sum()))
        on_zero_T = (routes.indices_TK[:, 0] == 0) & counted_T
        for group in range(len(settings.table.groups)) if groups is not None else ():
            here_T = (group_T == group) & counted_T
            context.record(f"expert_0_share/{settings.table.groups[group]}", (on_zero_T & here_T).sum(), here_T.sum())
        if groups is None:
            context.record("expert_0_share", on_zero_T.sum(), counted_T.sum())

    def _logit_losses(
        self,
        settings: LayerSettings,
        logits_TE: Tensor,
        counted_T: Tensor,
        groups: tuple[Tensor, frozenset[int]] | None,
    ) -> Tensor:
        """The losses of any router, soft or top-k, weighted: language prior and z-loss; 0 where neither is in force."""
        config, context = settings.config, self.context
        total = logits_TE.new_zeros(())
        if config.language_prior > 0:
            if groups is None:
                raise LanguageError(
                    f"The language-prior loss (coefficient {config.language_prior}, stage {config.stage!r}) needs the "
                    "language of every token, and none was given. Use LanguageCollator, or set language_prior_coef=0."
                )
            targets_TE = constant(settings.prior_targets, logits_TE.device)[groups[0]]
            prior, tokens = language_prior_loss(logits_TE=logits_TE, targets_TE=targets_TE, counted_T=counted_T)
            context.record("language_prior_loss", prior, tokens)
            total = total + config.language_prior * prior
        if config.router_z_loss_coef > 0:
            z, tokens = router_z_loss(logits_TE=logits_TE, counted_T=counted_T)
            context.record("router_z_loss", z, tokens)
            total = total + config.router_z_loss_coef * z
        return total

    def _record_classifier(
        self,
        settings: LayerSettings,
        state: ForwardState,
        x_TD: Tensor,
        groups: tuple[Tensor, frozenset[int]] | None,
        name: str,
    ) -> None:
        """Deposit the loss of this layer's gate, whose newest row learns to tell the original languages from others."""
        config, classifier, counted_T = settings.config, self.classifier(name), state.counted(x_TD)
        assert classifier is not None
        if groups is None:
            raise LanguageError(
                f"The classifiers' loss (coefficient {config.classifier_loss}, stage {config.stage!r}) needs the "
                "language of every token, and none was given. Use LanguageCollator, or set classifier_coef=0."
            )
        logits_TS = classifier(x_TD)
        logits_T = logits_TS.amin(dim=-1) if config.train_earlier_rows else logits_TS[:, config.newest_step]
        loss, tokens = classifier_loss(logits_T=logits_T, original_T=groups[0] == 0, counted_T=counted_T)
        self.context.record("classifier_loss", loss, tokens)
        state.losses.append((config.classifier_loss * loss, tokens))

    # What PEFT's base class assumes of a leaf layer with one weight, said for an MLP block.

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter; only what its stage trains gets gradients."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise PlanError(f"One adapter can be active at a time; got {names}. Activate one of them.")
        for name, settings in self.settings.items():
            frozen = (EXPERTS,) if settings.config.stage == "review" else ()
            if not settings.classifies or settings.config.classifier_loss == 0:
                frozen = (*frozen, CLASSIFIER)
            self.frozen_peft_weight_names[name] = frozen if settings.uses_router else (*frozen, ROUTER)
        super().set_adapter(names, inference_mode=inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT calls this on every road that switches gradients on.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or list(self.settings)
        for name in names:
            settings = self.settings.get(name)
            if settings is None or all(settings.trained_groups):
                continue
            for expert, group in zip(self.experts(name), settings.owners, strict=True):
                if not settings.trained_groups[group]:
                    expert.requires_grad_(False)
            if settings.config.train_earlier_rows:
                continue
            self.router(name).freeze_all_but(settings.trained_groups)
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


def trainable(module: nn.Module) -> bool:
    """Whether any parameter wants a gradient."""
    return any(p.requires_grad for p in module.parameters())
