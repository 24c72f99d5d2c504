"""`MoeDeltaConfig`: what a user asks for; what is filled in is its `record`."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig, TaskType

from ..errors import LanguageError, PlanError
from ..kinds import Count, Index, NotNegative
from ..languages import ORIGINAL_GROUP, LanguageTable
from ..plan import ExpertPlan
from ..routing import ClassifierRouting, ContextRouting, Routing, routing_named
from .readme import say_how_to_load
from .record import RECORDED, STAGES, AdapterRecord, checked, warn_of_flat_name, with_flat_names


class MoeDeltaType(str, Enum):
    """The `peft_type` of this method. PEFT's own enum cannot be extended, and transformers reads `.value`."""

    MOE_DELTA = "MOE_DELTA"


ATTENTION_EXPERTS = ("shared_kv", "full")

_RUNTIME_FIELDS = ("verify_base",)
_TASKS = (None, TaskType.CAUSAL_LM, TaskType.FEATURE_EXTRACTION)
_DERIVED = "_derived"

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@with_flat_names
@dataclass
class MoeDeltaConfig(PeftConfig):
    """Configuration of [`MoeDeltaModel`]: MLP blocks become experts that belong to language groups.

    Args:
        languages: language code -> group. Languages that the base model speaks are in the group `"original"`.
        experts: group -> number of new experts per transformed layer, as one number for all layers or as a list with a
            number for each (0 leaves a layer without). Or an `ExpertPlan`, which also sets `layers_to_transform` if it
            covers only some layers.
        top_k: how many experts each token uses, at most as many as it may use. None means 2.
        routing: which experts a token may use. `"learned"`: all of them; the router chooses (MoE-LPR). `"language"`:
            those of its language's group, and the call names the language (X-MOD, DMoE). `"context"`: the same, but if
            the call names no language, it is read from the text so far (see `fit_identifier`). `"classifier"`: as
            learned, but in `classifier_layers` a gate first sends tokens of original languages to expert 0 (LayerMoE).
        classifier_layers: the decoder layers with such a gate; see `most_similar_layers`.
        expert_rank: None for experts that are full copies of the MLP; a rank r for low-rank ones,
            `W_e = W_0 + B_e A_e` over the frozen MLP.
        attention_experts: None for experts of the MLP alone. `"full"` and `"shared_kv"` also make as many experts of
            each layer's attention, which every token mixes softly (BAM), with keys, values and cache of their own or
            shared.
        norm_topk_prob: whether the weights of a token's top k experts are scaled to a sum of 1, so that the model
            computes what it did before training; False keeps the probabilities as they are (BAM, with `top_k=1`).
        router_z_loss_coef: weight of the z-loss on all routers.
        target_modules: the MLP blocks, as in PEFT; None finds them by the model's type.
        exclude_modules: modules to leave out, as in PEFT.
        layers_to_transform: the decoder layers that get experts, as in PEFT; None means all.
        layers_pattern: the name of the layer list if it is an unusual one, as in PEFT.
        modules_to_save: further modules to train (in both stages) and to save whole, as in PEFT.
        load_balancing_coef: weight of the load-balancing loss; None means 0.01 in expansion and 0 in review.
        language_prior_coef: weight of the language-prior loss; None means 0 in expansion and 0.1 in review.
        language_prior_groups: the groups whose tokens this loss sends to their own experts; None means every group in
            expansion, and in review the original languages and all groups before the newest growth step.
        classifier_coef: weight of the gates' cross-entropy; None means 0 in expansion and 0.1 in review.
        verify_base: whether to refuse a base model whose weights differ from those that the adapter was trained on. Not
            saved.
        record: filled in by the library (stage, order of ids, growth, new tokens, grafts). Leave it out.

    Raises:
        LanguageError: `languages` is empty or malformed, or an unknown group in `language_prior_groups`.
        TypeError: an unknown field; the message says what is spelt nearly like it.
        PlanError: unknown routing, `top_k` or `expert_rank` below 1, a value of a wrong type, another task.
    """

    task_type: str | TaskType | None = field(default=TaskType.CAUSAL_LM)
    languages: dict[str, str] = field(default_factory=dict)
    experts: Any = field(default_factory=dict)
    top_k: Count | None = None
    routing: str = "learned"
    classifier_layers: list[Index] | None = None
    expert_rank: Count | None = None
    attention_experts: str | None = None
    norm_topk_prob: bool = True
    router_z_loss_coef: NotNegative = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[Index] | Index | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    load_balancing_coef: NotNegative | None = None
    language_prior_coef: NotNegative | None = None
    language_prior_groups: list[str] | None = None
    classifier_coef: NotNegative | None = None
    verify_base: bool = True
    record: AdapterRecord = field(default_factory=AdapterRecord)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MoeDeltaType.MOE_DELTA
        _check_kinds(self)
        if isinstance(self.experts, ExpertPlan):
            self._take_plan(self.experts)
        table = _language_table(self)
        self.record = replace(self.record, language_ids=table.codes, group_order=table.groups)
        if isinstance(self.routing_rule, ClassifierRouting) and not self.classifier_layers:
            raise PlanError(
                "Routing 'classifier' needs `classifier_layers`, the decoder layers that get a gate: those where "
                f"languages look most alike (see most_similar_layers); got {self.classifier_layers!r}."
            )
        if self.attention_experts not in (None, *ATTENTION_EXPERTS):
            raise PlanError(
                f"Unknown attention_experts={self.attention_experts!r}; expected None or one of: "
                f"{', '.join(ATTENTION_EXPERTS)}."
            )
        unknown = set(self.language_prior_groups or ()) - set(table.groups)
        if unknown:
            raise LanguageError(
                f"`language_prior_groups` names {sorted(unknown)}; the groups are {', '.join(table.groups)}."
            )
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise PlanError(
                f"`layers_to_transform` and `layers_pattern` have no effect on the regular expression target_modules="
                f"{self.target_modules!r}. Put the layers into the expression, or give a list of module names."
            )
        if self.wanted_layers is not None and self.wanted_layers != sorted(set(self.wanted_layers)):
            raise PlanError(
                "`layers_to_transform` must be ascending, since per-layer expert counts follow it; got "
                f"{self.wanted_layers}."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RECORDED:
            warn_of_flat_name(name, stacklevel=3)
        if name in RECORDED or (self.__dict__.get(_DERIVED) and name not in PeftConfig.__dataclass_fields__):
            self.change(**{name: value})
        else:
            super().__setattr__(name, value)

    def change(self, **values: Any) -> None:
        """Set fields, or names of the record, and compile again what is derived from them, at once.

        Every change of a configuration that is in use comes through here, setting an attribute included, so no layer
        can run on tables of the routing before. (Fields are set, not changed in place.) The result is checked as a new
        configuration is, and where that fails, nothing is changed.

        Raises:
            LanguageError, PlanError: as for a new configuration.
        """
        before, changed = dict(self.__dict__), replace(self, **values)
        self.__dict__.update({**changed.__dict__, _DERIVED: {}})
        same_groups = self.record.group_order == before["record"].group_order
        try:
            for make, key in before.get(_DERIVED, {}):
                if same_groups or key is None:  # each layer asks for its own again when it is given other experts
                    self.derived(make, key)
        except Exception:
            self.__dict__.update(before)
            raise

    def derived(self, make: Callable[[MoeDeltaConfig, K], T], key: K) -> T:
        """`make(self, key)`, kept until a field changes, and then made anew by `change`."""
        kept: dict[Any, T] = self.__dict__.setdefault(_DERIVED, {})
        if (make, key) not in kept:
            kept[make, key] = make(self, key)
        return kept[make, key]

    def _take_plan(self, plan: ExpertPlan) -> None:
        """Turn a plan into fields, which are what is saved."""
        fields = plan.config_fields()
        if self.layers_to_transform is not None and self.wanted_layers != list(plan.layers):
            raise PlanError(
                f"The plan is for the layers {list(plan.layers)}, `layers_to_transform` says {self.wanted_layers}. "
                "Leave `layers_to_transform` out, or allocate again for those layers."
            )
        self.experts = fields["experts"]
        if self.layers_to_transform is None:
            self.layers_to_transform = fields["layers_to_transform"]

    @property
    def language_table(self) -> LanguageTable:
        """Languages and groups with their ids, in the saved order."""
        return self.derived(_language_table, None)

    @property
    def wanted_layers(self) -> list[int] | None:
        """`layers_to_transform` as a list; None where every layer is transformed."""
        layers = self.layers_to_transform
        return [layers] if isinstance(layers, int) else layers or None

    @property
    def routing_rule(self) -> Routing:
        """The routing, by name."""
        return routing_named(self.routing)

    @property
    def must_be_told(self) -> bool:
        """Whether a call has to name a language: the routing needs it, and nothing reads it from the text."""
        reads = isinstance(self.routing_rule, ContextRouting) and self.record.identifier is not None
        return self.routing_rule.needs_language and not reads

    @property
    def experts_per_token(self) -> int:
        """`top_k`, or its default of 2 (MoE-LPR)."""
        return 2 if self.top_k is None else self.top_k

    @property
    def load_balancing(self) -> float:
        """The load-balancing coefficient in force."""
        return STAGES[self.record.stage][0] if self.load_balancing_coef is None else self.load_balancing_coef

    @property
    def language_prior(self) -> float:
        """The language-prior coefficient in force."""
        return STAGES[self.record.stage][1] if self.language_prior_coef is None else self.language_prior_coef

    @property
    def classifier_loss(self) -> float:
        """The coefficient of the gates' cross-entropy in force: 0 where the routing has none."""
        if not isinstance(self.routing_rule, ClassifierRouting):
            return 0.0
        return (0.1 if self.record.stage == "review" else 0.0) if self.classifier_coef is None else self.classifier_coef

    @property
    def prior_groups(self) -> tuple[str, ...]:
        """The groups that the language-prior loss speaks for, in the stage under way."""
        if self.language_prior_groups is not None:
            return tuple(self.language_prior_groups)
        groups = self.language_table.groups
        if self.record.stage != "review":
            return groups
        protected = [g for g, step in zip(groups, self.steps, strict=True) if step < self.newest_step]
        return tuple(protected) or (ORIGINAL_GROUP,)

    @property
    def steps(self) -> tuple[int, ...]:
        """The growth step that brought each group, in the order of groups; 0 for those the adapter began with."""
        came_with = {group: i for i, step in enumerate(self.record.growth, start=1) for group in step.groups}
        return tuple(came_with.get(group, 0) for group in self.record.group_order)

    @property
    def newest_step(self) -> int:
        """The growth step whose groups train; 0 for an adapter that has not grown."""
        return len(self.record.growth)

    def plan(self, layers: list[int]) -> ExpertPlan:
        """The experts of a model whose transformed decoder layers are `layers`, ascending.

        Raises:
            PlanError: see `ExpertPlan.build`; or `top_k` exceeds the largest set of experts any token may use, or a
                classifier on a layer that is not transformed.
        """
        outside = sorted(set(self.classifier_layers or ()) - set(layers))
        if outside:
            raise PlanError(
                f"`classifier_layers` names {outside}, which are not among the transformed layers {layers}. A gate "
                "stands before a router: choose among those."
            )
        plan = ExpertPlan.build(layers, self.language_table.groups, self.experts)
        self.check_top_k(plan)
        return plan

    def check_top_k(self, plan: ExpertPlan) -> None:
        """Refuse a `top_k` that no token could ever use.

        Raises:
            PlanError: `top_k` exceeds the largest set of experts any token may use under the routing in force.
        """
        largest = max(sum(row) for counts in plan.counts for row in self.routing_rule.allowed_experts(counts))
        if self.top_k is not None and self.top_k > largest:
            raise PlanError(
                f"top_k={self.top_k} exceeds {largest}, the largest set of experts any token may use under "
                f"{self.routing!r} routing with experts={self.experts}. Lower top_k or add experts."
            )

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """As PEFT does; the README that it wrote for the adapter then says how to load it."""
        super().save_pretrained(save_directory, **options)
        say_how_to_load(Path(save_directory) / "README.md")

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved."""
        return {key: value for key, value in super().to_dict().items() if key not in _RUNTIME_FIELDS}


def _language_table(config: MoeDeltaConfig, _: None = None) -> LanguageTable:
    record = config.record
    return LanguageTable.build(config.languages, record.language_ids or None, record.group_order or None)


def _check_kinds(config: MoeDeltaConfig) -> None:
    """Refuse a field of another kind than its annotation says; `languages` and `experts` are checked as tables."""
    for name, hint in typing.get_type_hints(MoeDeltaConfig, include_extras=True).items():
        if name in PeftConfig.__dataclass_fields__ or name in ("languages", "experts", "record"):
            continue
        checked(hint, getattr(config, name), name)
    if config.task_type not in _TASKS:
        raise PlanError(
            f"Experts are for causal language models: task_type 'CAUSAL_LM' or None; got {config.task_type!r}. To "
            "classify, make a stand-alone model (merge_and_graft) and put the head, or LoRA, on that."
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):  # of which PEFT makes regular expressions
        given = getattr(config, name)
        for expression in given if name == "layers_pattern" and isinstance(given, list) else [given]:
            try:
                re.compile(expression if isinstance(expression, str) else "")
            except re.error as error:
                raise PlanError(
                    f"`{name}`: got {expression!r}, expected a regular expression: {error}. Put a backslash before a "
                    "character that stands for itself, or give a list of module names."
                ) from None


def check_one_active(ours: Collection[str], active: Sequence[str]) -> None:
    """Refuse two adapters of this kind at once; other methods' adapters, in other layers, are none of our business.

    Raises:
        PlanError: there are two.
    """
    if len(set(ours) & set(active)) > 1:
        raise PlanError(f"One adapter with experts can be active at a time; got {list(active)}. Activate one of them.")
