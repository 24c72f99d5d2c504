"""The methods, an entry each: `(pair, text, rate, steps, seed)` -> a `Family`.

All of them read the same new-language text in the same order. A method that is not ours gets the graft where its idea
does not forbid it: what is compared is where new languages are kept, not who has a delta. Methods that train the same
and differ in what comes after share a training, and each has a copy of what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from pairs import ENGLISH, LENGTH, copy_of, fit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_moe_delta import MoeDeltaConfig, allocate_experts, fit_identifier, fit_routers, group_languages
from peft_moe_delta.allocation import LanguageStatistics, Measurement, measure_languages
from peft_moe_delta.graft.memory import tuner_of

from .blocks import expanded, new_blocks
from .family import Family, added, calibrated_family, dense_family, grafted_family, trainable
from .material import Material, Pair

RANK = 8
MEASURED: Mapping[str, Any] = {
    "tokens": 2000, "steps": 10, "step_sequences": 2, "sequence_length": LENGTH, "learning_rate": 1e-3,
}  # fmt: skip
"""How much plans are made on; DMoE's own rate would hardly move a model of this size."""
IDENTIFIED = 400  # documents of each language that an identifier counts
UPPER: Mapping[str, Any] = {"answer_cost": 0.25}
"""How routers in the upper half are calibrated: they hardly change answers, so that what they gain decides."""
REVIEWED = 8  # one step of review for so many of expansion
KEPT = 4  # trainings that a process holds, for methods that share them and their learning rates
Make = Callable[[Pair, Material, float, int, int], Family]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: what tables call it.
        make: trains it.
        trains: whether there is anything to train, and so a rate and a number of steps.
        training: the name of the training, where methods have the same.
    """

    title: str
    make: Make
    trains: bool = True
    training: str = ""


# -- dense ------------------------------------------------------------------------------------------------------------


def base(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    return Family(lambda a, s: pair.base, shares=(1.0,), scales=(1.0,))


def post_trained(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """Nothing but the delta, which may be scaled."""
    model = copy_of(pair.base)
    return Family(dense_family(pair.base, pair.tuned, model, 0).at, shares=(1.0,))


def dense(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """Continual pre-training of all weights of the base, plus the delta (ParamDelta, arXiv 2504.21023)."""
    return dense_family(pair.base, pair.tuned, *read_on(copy_of(pair.base), text, rate, steps, seed))


def dense_post_trained(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """Continual pre-training of the post-trained model itself."""
    return dense_family(pair.tuned, pair.tuned, *read_on(copy_of(pair.tuned), text, rate, steps, seed))


def lora(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """LoRA on every linear map of the base, with as many parameters as ours of low rank, plus the delta."""
    model = copy_of(pair.base)
    a_rank = trainable(with_lora(copy_of(pair.base), 1))
    ours = added(upcycled(pair.base, text, expert_rank=RANK))
    adapted, trained = read_on(with_lora(model, round(ours / a_rank)), text, rate, steps, seed)
    return dense_family(pair.base, pair.tuned, adapted.merge_and_unload(), trained)


def block_expansion(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """New blocks that begin as copies and add nothing, trained alone (LLaMA-Pro, arXiv 2401.02415), plus the delta.

    As many as have the parameters of our experts. Blocks that were copied get the delta of their originals, where those
    put it through: a linear map of weights, as any upcycling is.
    """
    count = new_blocks(pair.base, added(upcycled(pair.base, text)))
    before, after = (expanded(pair.making, model, text, count) for model in (pair.base, pair.tuned))
    model = expanded(pair.making, pair.base, text, count, train_new=True)
    return dense_family(before, after, *read_on(model, text, rate, steps, seed))


def read_on(model: Any, text: Material, rate: float, steps: int, seed: int) -> tuple[Any, int]:
    """Train what wants a gradient on the new languages. Returns the model, and how many parameters that was."""
    trained = trainable(model)
    fit(model, ({"input_ids": ids, "labels": ids} for _, ids in text.new_text(steps, seed)), steps, rate)
    return model, trained


def with_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


# -- experts ----------------------------------------------------------------------------------------------------------


@lru_cache(KEPT)
def by_language(
    pair: Pair, text: Material, rate: float, steps: int, seed: int, over: str = "base", upper: bool = False
) -> PeftModel:
    """An expert in each layer for every new language, expanded over the base or over the post-trained model itself.

    `upper`: in the upper half of the layers alone.
    """
    changes = upper_half(pair) if upper else {}
    return expand(upcycled(getattr(pair, over), text, **changes), text, rate, steps, seed)


def copy_after(train: Callable[..., PeftModel], *setting: Any) -> PeftModel:
    """A copy of what a training made. What comes next draws the same numbers whether it was trained just now or not."""
    model = deepcopy(train(*setting))
    torch.manual_seed(setting[4])
    return model


def told(*setting: Any, over: str = "base") -> Family:
    """Told the language of each text."""
    return grafted_family(copy_after(by_language, *setting, over), setting[0].tuned, told=True, **scales_of(over))


def by_context(*setting: Any, over: str = "base") -> Family:
    """The language is read from the text so far."""
    model, (pair, text, *_) = copy_after(by_language, *setting, over), setting
    fit_identifier(model, {code: found[:IDENTIFIED] for code, found in text.train.items()}, text.tokenizer)
    tuner_of(model).active_config.change(routing="context")
    return grafted_family(model, pair.tuned, **scales_of(over))


def learned(*setting: Any, over: str = "base", top_k: int = 1, upper: bool = False) -> Family:
    """Behind routers that are calibrated after the graft: a stock checkpoint."""
    model, (pair, text, *_, seed) = copy_after(by_language, *setting, over, upper), setting
    model.start_review(routing="learned")
    tuner_of(model).active_config.change(top_k=top_k)
    fit_routers(model, {code: found[:200] for code, found in text.train.items()}, text.tokenizer, max_length=LENGTH)
    return calibrated_family(model, pair, text, seed, UPPER if upper else {}, **scales_of(over))


def scales_of(over: str) -> dict[str, tuple[float, ...]]:
    """Over the post-trained model there is no delta to be scaled."""
    return {"scales": (1.0,)} if over == "tuned" else {}


def ours_by_language_low_rank(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    model = expand(upcycled(pair.base, text, expert_rank=RANK), text, rate, steps, seed)
    return grafted_family(model, pair.tuned, told=True)


@lru_cache(KEPT)
def two_stages(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> PeftModel:
    """MoE-LPR's (arXiv 2408.11396): shared experts and routers that learn together, then a review."""
    return reviewed(pair, text, rate, steps, seed)


def moe_lpr(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """As published, without a delta."""
    return grafted_family(copy_after(two_stages, pair, text, rate, steps, seed), pair.tuned, scales=(0.0,))


def moe_lpr_grafted(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """With the delta, as DeltaMoE (arXiv 2605.18083) has it."""
    return calibrated_family(copy_after(two_stages, pair, text, rate, steps, seed), pair, text, seed)


def moe_lpr_upper(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """The same with experts in the upper half of the layers."""
    model = reviewed(pair, text, rate, steps, seed, **upper_half(pair))
    return calibrated_family(model, pair, text, seed, UPPER)


def layer_moe(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """The same with as many experts, but more of them where languages look less alike (LayerMoE, arXiv 2505.22582)."""
    measured = statistics_of(pair, text, "similarity", seed)
    languages = shared_group(text)
    plan = allocate_experts(measured, "inverse_similarity", budget_of(pair, text), languages=languages)
    model = reviewed(pair, text, rate, steps, seed, languages=languages, experts=plan)
    return calibrated_family(model, pair, text, seed)


def dmoe(pair: Pair, text: Material, rate: float, steps: int, seed: int) -> Family:
    """Languages in two groups by how they move the weights, experts in the layers that move most; a tenth of the steps
    under hard routing, then top-2 with the routers told the groups (DMoE, arXiv 2506.12388). As many experts as ours.
    """
    measured = statistics_of(pair, text, "deviation", seed)
    groups = group_languages(measured.between_languages(), text.new, num_groups=2, original=[ENGLISH], resamples=0)
    budget, layers = budget_of(pair, text), max(1, 3 * pair.base.config.num_hidden_layers // 4)
    languages = groups.as_languages()
    plan = allocate_experts(
        measured, "deviation_threshold", languages=languages, top_layers=layers, experts_per_group=budget // layers // 2
    )
    model = upcycled(pair.base, text, languages=languages, experts=plan, top_k=2)
    hard = max(1, steps // 10)
    expand(model, text, rate, steps, seed, until=hard)
    named = [group for group in set(languages.values()) if group != "original"]
    model.start_expansion(routing="learned", language_prior_coef=1.28, language_prior_groups=sorted(named))
    expand(model, text, rate, steps, seed, begin=hard)
    review(model, text, rate, steps, seed)
    return calibrated_family(model, pair, text, seed)


def statistics_of(pair: Pair, text: Material, source: str, seed: int) -> LanguageStatistics:
    """What a plan is made from, measured on training text."""
    measurement = Measurement(**MEASURED, seed=seed)
    return measure_languages(pair.base, text.tokenizer, text.train, sources=[source], measurement=measurement)


def upcycled(model: PreTrainedModel, text: Material, **changes: Any) -> PeftModel:
    """A copy of a model with an expert in each layer for every new language, by language, but for `changes`."""
    own = {code: code for code in text.new}
    options = {"languages": {ENGLISH: "original", **own}, "experts": dict.fromkeys(own, 1), "routing": "language"}
    return get_peft_model(copy_of(model), MoeDeltaConfig(**{**options, "top_k": 1, **changes}))


def reviewed(pair: Pair, text: Material, rate: float, steps: int, seed: int, **changes: Any) -> PeftModel:
    """MoE-LPR's two stages, with as many experts in a layer as there are new languages, but for `changes`."""
    shared = {"languages": shared_group(text), "experts": {"expanded": len(text.new)}}
    options = {**shared, "routing": "learned", "top_k": 2, **changes}
    model = expand(upcycled(pair.base, text, **options), text, rate, steps, seed)
    return review(model, text, rate, steps, seed)


def expand(
    model: PeftModel, text: Material, rate: float, steps: int, seed: int, begin: int = 0, until: int | None = None
) -> PeftModel:
    """Train experts on the new languages, each batch with the name of its language; a part of the steps for a stage."""
    batches = list(text.new_text(steps, seed))[begin:until]
    fit(model, (named(code, ids) for code, ids in batches), max(1, len(batches)), rate)
    return model


def review(model: PeftModel, text: Material, rate: float, steps: int, seed: int) -> PeftModel:
    """Train the routers on all languages, so that English goes to expert 0."""
    number = max(1, steps // REVIEWED)
    model.start_review()
    fit(model, (named(codes, ids) for codes, ids in text.all_text(number, seed)), number, rate)
    return model


def named(language: Any, ids: Any) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids, "language": language, "use_cache": False}


def upper_half(pair: Pair) -> dict[str, Any]:
    """Experts in the upper half of the layers alone: every router reads what the layers below saw of the context."""
    layers = pair.base.config.num_hidden_layers
    return {"layers_to_transform": list(range(layers // 2, layers))}


def shared_group(text: Material) -> dict[str, str]:
    """All new languages in one group."""
    return {ENGLISH: "original", **dict.fromkeys(text.new, "expanded")}


def budget_of(pair: Pair, text: Material) -> int:
    """New experts over all layers: one in each for every new language."""
    return len(text.new) * int(pair.base.config.num_hidden_layers)


METHODS: Mapping[str, Method] = {
    "base": Method("base", base, trains=False),
    "post-trained": Method("post-trained", post_trained, trains=False),
    "dense": Method("dense CPT + delta", dense),
    "dense-post-trained": Method("dense CPT of the post-trained", dense_post_trained),
    "lora": Method("LoRA CPT + delta", lora),
    "block-expansion": Method("block expansion + delta", block_expansion),
    "moe-lpr": Method("MoE-LPR, no delta", moe_lpr, training="two stages"),
    "moe-lpr-grafted": Method("MoE-LPR + delta", moe_lpr_grafted, training="two stages"),
    "moe-lpr-upper": Method("MoE-LPR + delta, upper half", moe_lpr_upper),
    "layer-moe": Method("LayerMoE plan + delta", layer_moe),
    "dmoe": Method("DMoE groups + delta", dmoe),
    "over-told": Method("ours over the post-trained, told", partial(told, over="tuned"), training="over"),
    "over-context": Method(
        "ours over the post-trained, by context", partial(by_context, over="tuned"), training="over"
    ),
    "over-learned": Method("ours over the post-trained, learned", partial(learned, over="tuned"), training="over"),
    "over-learned-upper": Method(
        "ours over the post-trained, learned, upper half", partial(learned, over="tuned", upper=True)
    ),
    "ours-by-language": Method("ours by language, told", told, training="ours"),
    "ours-low-rank": Method("ours by language, rank 8, told", ours_by_language_low_rank),
    "ours-by-context": Method("ours by context", by_context, training="ours"),
    "ours-learned": Method("ours learned, top-1", learned, training="ours"),
    "ours-learned-top-2": Method("ours learned, top-2", partial(learned, top_k=2), training="ours"),
    "ours-learned-upper": Method("ours learned, top-1, upper half", partial(learned, upper=True)),
}
"""In the order of tables; CPT: continual pre-training."""


def by_training(methods: Iterable[str]) -> list[list[str]]:
    """Methods that share a training side by side."""
    found: dict[str, list[str]] = {}
    for name in methods:
        found.setdefault(METHODS[name].training or name, []).append(name)
    return list(found.values())
