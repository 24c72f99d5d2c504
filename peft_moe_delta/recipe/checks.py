"""What can be known before the first step: whether a recipe can be carried out to its end.

In: a recipe. Out: nothing, or an error that names the field. Configs are read and no weight is; text is read and
tokenised before the first training, so that none is found wanting after it.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from ..architectures import mlp_module_name
from ..errors import GraftError, PeftMoeDeltaError, RecipeError
from ..export import Fit, choose
from ..graft.explain import weights_of
from ..graft.kinship import check_same_kind
from ..graft.scale import scale_of_groups
from ..graft.weights import exported_share
from ..languages import closest_code
from ..loading import load_config, load_tokenizer
from ..routing import ContextRouting, routing_named
from ..sources import read_tasks, read_texts
from ..tuner import MoeDeltaConfig
from .fields import AUTO, Calibrate, Recipe
from .stages import adapter_config, blocks
from .trainer import check_trainer

_SAME = ("num_hidden_layers", "hidden_size", "intermediate_size")


def check_training(recipe: Recipe) -> None:
    """Refuse languages, experts, stages and lengths that do not fit each other or the model.

    Raises:
        RecipeError: the model has fewer layers or positions than the recipe asks for.
        CheckpointError: there is no such model.
        LanguageError, PlanError, ArchitectureError: as `MoeDeltaConfig` and `get_peft_model` would refuse it later.
    """
    base = _base(recipe)
    trained = {"tune": recipe.tune, "expand": recipe.expand, "review": recipe.review, "dense": recipe.dense}
    positions = getattr(base.get_text_config(), "max_position_embeddings", None)
    for name, fields in trained.items():
        if fields is not None:
            check_trainer(name, fields)
        if fields is not None and name != "tune" and positions is not None and fields.sequence_length > positions:
            raise RecipeError(
                f"{name}: sequence_length is {fields.sequence_length}, and {recipe.model} has {positions} positions. "
                "Train on shorter sequences."
            )
    weights_of(_at_the_end(recipe, base), base)


def check_graft(recipe: Recipe) -> Fit:
    """Refuse a graft that could not be written or scored. Returns the form it takes.

    Raises:
        RecipeError: no form holds it exactly (the message says what does), unknown groups in `expert_scale`, nothing to
            choose an expert scale on, or a post-trained model of another kind or size.
    """
    base = _base(recipe)
    other = base if recipe.post_trained is None else load_config(recipe.post_trained)
    for name in _SAME:
        ours, theirs = (getattr(config.get_text_config(), name, None) for config in (base, other))
        if ours != theirs:
            cut = " `num_hidden_layers` cuts the base model alone." if name == "num_hidden_layers" else ""
            raise RecipeError(f"post_trained: its {name} is {theirs}, that of the base model {ours}.{cut}")
    fields, config = recipe.graft, _at_the_end(recipe, base)
    if config.routing_rule.needs_language and not reads_languages(recipe) and fields.language is None:
        raise RecipeError(
            f"graft: after training, routing is {config.routing!r}, and neither a stand-alone model nor its scores "
            f"name a language. Say what to ship: `graft: {{language: ...}}` (one of {', '.join(config.languages)}), or "
            "let a `review` with `routing: learned` teach the routers, or `adapter: {routing: context}` read it from "
            "the text. `peft-moe-delta train` stops at the adapter."
        )
    if fields.by_context and isinstance(config.routing_rule, ContextRouting):
        raise RecipeError(
            f"graft: by_context ships a second form, and routing {config.routing!r} makes the first one that already. "
            "Remove it."
        )
    try:
        check_same_kind(base.model_type, other.model_type)
        weights = weights_of(config, other)
        if fields.expert_scale != AUTO:
            scale_of_groups(weights.plan.groups[1:], fields.expert_scale)
        elif not any(recipe.languages[code].validation for code in recipe.expanded_languages):
            raise GraftError(
                'expert_scale: "auto" is chosen on held-out text, but no expanded language has a `validation` file. '
                "Name one, or give a number."
            )
        share = exported_share(weights, config, fields.language, remote_code=fields.remote_code)
        return choose(
            share,
            replicate_dense_layers=fields.replicate_dense_layers,
            remote_code=fields.remote_code,
            architecture=fields.architecture,
            serve_with=fields.serve_with,
        )
    except PeftMoeDeltaError as error:
        raise RecipeError(
            f"graft: {error} In a recipe: `graft: {{remote_code: true}}`, `{{replicate_dense_layers: true}}` or "
            "`{language: ...}`; `peft-moe-delta train` stops at the adapter."
        ) from error


def reads_languages(recipe: Recipe) -> bool:
    """Whether the adapter that is shipped reads the language of a text by itself."""
    routing = recipe.adapter.routing if recipe.review is None else recipe.review.routing or recipe.adapter.routing
    return isinstance(routing_named(routing), ContextRouting)


def calibration(recipe: Recipe) -> Calibrate | None:
    """What is done for the routers after the graft; None where nothing is asked, as under routing by language."""
    routing = (recipe.review.routing if recipe.review is not None else None) or recipe.adapter.routing
    return None if routing_named(routing).needs_language else recipe.calibrate


def check_text(recipe: Recipe) -> None:
    """Refuse files that lack text for a training.

    Raises:
        DataError: a file is missing, is not what it should be, or is too short.
    """
    tokenizer = load_tokenizer(recipe.model)
    if recipe.tune is not None:
        read_tasks(recipe.tune.tasks)
    blocks(recipe, tokenizer, recipe.expanded_languages, recipe.expand)
    if recipe.review is not None:
        blocks(recipe, tokenizer, list(recipe.languages), recipe.review)


def check_unseen(recipe: Recipe) -> None:
    """Refuse a language that nobody is to name, and that has a group.

    Raises:
        RecipeError: there is one.
    """
    if known := [code for code in recipe.unseen if closest_code(code, recipe.languages)]:
        raise RecipeError(
            f"unseen: {', '.join(known)} is among the languages, so it is scored already. Remove it here."
        )


def check_held_out(recipe: Recipe) -> None:
    """Refuse files that could not be scored on, or calibrated with.

    Raises:
        RecipeError: as `check_unseen`.
        DataError: a file is missing, or is not what it should be.
    """
    check_unseen(recipe)
    for code, unseen in recipe.unseen.items():
        read_texts(unseen, language=code)
    for code, language in recipe.languages.items():
        for text in (language.test, language.validation):
            if text is not None:
                read_texts(text, language=code)
        if calibration(recipe) is not None:
            read_texts(language.train, language=code)
    for tasks in recipe.tasks.values():
        for asked in (tasks.test, tasks.validation):
            if asked is not None:
                read_tasks(asked)


def _base(recipe: Recipe) -> PretrainedConfig:
    """The base model's config, cut as the recipe says."""
    config, wanted = load_config(recipe.model), recipe.num_hidden_layers
    if wanted is None:
        return config
    layers = config.get_text_config().num_hidden_layers
    if wanted > layers:
        raise RecipeError(f"num_hidden_layers is {wanted}, but {recipe.model} has {layers} layers to cut down.")
    return load_config(recipe.model, num_hidden_layers=wanted)


def _at_the_end(recipe: Recipe, base: PretrainedConfig) -> MoeDeltaConfig:
    """The adapter's config after all its training."""
    config = adapter_config(recipe)
    config.target_modules = [mlp_module_name(base.model_type)]
    weights_of(config, base)
    review = recipe.review
    if review is None:
        return config
    return replace(
        config,
        record=replace(config.record, stage="review"),
        routing=review.routing or config.routing,
        language_prior_coef=review.language_prior_coef,
        language_prior_groups=review.language_prior_groups,
    )
