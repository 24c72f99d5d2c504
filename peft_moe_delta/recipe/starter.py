"""`init`: a recipe to start from, for a model and text that one has.

In: names of models, and a source of text for each language. Out: a commented recipe that passes a dry run. Each source
gives text to train on and text to test on, by `part`; steps are as many as there is text for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from ..errors import LanguageError, RecipeError
from ..kinds import read_fields
from ..languages import ORIGINAL_GROUP
from ..loading import load_config, load_tokenizer
from ..sources import TextSource, each_text, source_of
from . import checks
from .fields import Recipe
from .foresight import bytes_on_disk, count_tokens
from .reader import parsed

log = logging.getLogger(__name__)

_BATCH = 8
_STEPS, _REVIEW_STEPS = 1000, 100
_LENGTHS = (1024, 512, 256, 128, 64, 32, 16)
_TEXT_SHARE = 0.5  # of a file's bytes that are text, at the least: the rest is names of columns and quotes
_PLENTY = 10**9  # tokens, where text is long and nothing tells how long

_RECIPE = """\
# What `peft-moe-delta run` is to do. docs/recipe.md says what every field means, docs/data.md what text may be.
#
#   peft-moe-delta run THIS_FILE --dry-run    # checks all of it, and says what would be done
#   peft-moe-delta run THIS_FILE              # does it; steps that are done are kept
#   peft-moe-delta status THIS_FILE           # how far it is

# The base model, and {post_trained_note}
model: {model}
post_trained: {post_trained}
output: run

# Code of a language -> its group and its text. Languages of one group share experts; `original` are those that the
# model speaks, which it is to keep. Of every ten rows one is to test on, and one to choose by.
languages:
{languages}

# One new expert for each group in every layer. Trained by language, then the routers learn to tell languages apart.
# `expert_rank: 16` trains low-rank experts, which take a fraction of the memory.
adapter: {{experts: {{{experts}}}, routing: language, top_k: 1}}

# Stage 1, the experts: as many steps as there is text for, {most} at the most, of rows as long as it fills.
expand: {{steps: {steps}, batch_size: {batch}, sequence_length: {length}, learning_rate: 5.0e-5}}

# Stage 2, the routers, on text of all languages.
review:
  {{routing: learned, language_prior_groups: [{groups}], language_prior_coef: 1.0,
   steps: {review_steps}, batch_size: {batch}, sequence_length: {length}, learning_rate: 2.0e-2}}

# How much of the experts' change to keep is chosen on the validation text.{graft_note}
graft: {{expert_scale: auto{graft}}}

# How much is scored; more takes longer and gives narrower intervals.
limits: {{test_documents: 200, validation_documents: 50, document_bytes: 2000}}
"""


def starter(model: str, post_trained: str | None, languages: Mapping[str, str], originals: Mapping[str, str]) -> str:
    """A recipe as text.

    Args:
        model: the base model.
        post_trained: its post-trained sibling; None for the base itself, which a graft leaves as it is.
        languages: code -> path of text, with options behind `#`, of those to learn.
        originals: the same of those that the model speaks.

    Raises:
        LanguageError: a language is both.
        RecipeError: there is too little text for a single step.
        DataError, CheckpointError: text or a model cannot be read.
    """
    if both := sorted(set(languages) & set(originals)):
        raise LanguageError(f"{', '.join(both)}: given as --language and as --original. A language is one of the two.")
    if not originals:
        log.warning(
            "No --original is given: the review will not show the routers what the model spoke before, and nobody will "
            "measure whether that is kept. Add --original en=FILE for each such language that you have text of."
        )
    config, tokenizer = load_config(model), load_tokenizer(model)
    texts = {**originals, **languages}
    there = {code: _tokens(with_part(path, "train"), code, tokenizer) for code, path in texts.items()}
    longest = getattr(config.get_text_config(), "max_position_embeddings", _LENGTHS[0])
    length = _length(min(there.values()), len(languages), longest)
    steps = min(_STEPS, _steps(min(there[code] for code in languages), len(languages), length))
    review = min(_REVIEW_STEPS, _steps(min(there.values()), len(there), length))
    said = {
        "model": json.dumps(model),
        "post_trained": json.dumps(post_trained or model),
        "post_trained_note": _NAMED if post_trained else _UNNAMED,
        "languages": "\n".join(_language(code, path, code in originals) for code, path in texts.items()),
        "experts": ", ".join(f"{json.dumps(code)}: 1" for code in languages),
        "groups": ", ".join([ORIGINAL_GROUP, *map(json.dumps, languages)]),
        "most": _STEPS, "steps": steps, "batch": _BATCH, "length": length, "review_steps": review,
    }  # fmt: skip
    return _shippable(said)


def with_part(path: str, part: str) -> str:
    """A source's short form that names a part of it."""
    return f"{path}{'#' if source_of(path, TextSource).path == path else ','}part={part}"


def _tokens(path: str, code: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a language's text has, rather too few than too many."""
    counted, size, at_end = count_tokens(each_text(path, code), tokenizer)
    if at_end:
        return counted
    most = bytes_on_disk(path)
    return _PLENTY if most is None else max(counted, int(most * _TEXT_SHARE * counted / size))


def _length(tokens: int, languages: int, longest: int) -> int:
    """The longest sequences that leave text for a good number of steps, or for as many as there can be.

    Raises:
        RecipeError: there is too little for any.
    """
    wanted = min(_REVIEW_STEPS, _steps(tokens, languages, _LENGTHS[-1]))
    for length in _LENGTHS if wanted else ():
        if length <= longest and _steps(tokens, languages, length) >= wanted:
            return length
    raise RecipeError(
        f"A language has {tokens:,} tokens to train on, too few for a step of {_BATCH} x {_LENGTHS[-1]} tokens. Bring "
        "more text."
    )


def _steps(tokens: int, languages: int, length: int) -> int:
    """How many steps a training may have that takes as much of every language."""
    return tokens // length * languages // _BATCH


def _language(code: str, path: str, is_original: bool) -> str:
    splits = [("train", "train"), ("validation", "validation"), ("test", "test")]
    lines = [f"    {split}: {json.dumps(with_part(path, part), ensure_ascii=False)}" for split, part in splits]
    group = ORIGINAL_GROUP if is_original else json.dumps(code)
    return "\n".join([f"  {json.dumps(code)}:", f"    group: {group}", *lines])


def _shippable(said: Mapping[str, object]) -> str:
    """The recipe; with a modelling file of its own where no stock architecture holds the model."""
    text = _RECIPE.format(**said, graft="", graft_note="")
    recipe: Recipe = read_fields(Recipe, parsed(text, "the recipe"), "the recipe")
    checks.check_training(recipe)
    try:
        checks.check_graft(recipe)
    except RecipeError:
        return _RECIPE.format(**said, graft=", remote_code: true", graft_note=_OWN_CODE)
    return text


_NAMED = "the model that was post-trained from that very base."
_UNNAMED = (
    "the model that was post-trained from that very base. None was named, so here it is\n# the base itself: it learns "
    "the languages, and the graft adds nothing."
)
_OWN_CODE = " No stock architecture holds this\n# model with experts, so it ships with a small modelling file."
