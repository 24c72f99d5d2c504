"""The recipe's JSON Schema: what an editor makes of a recipe is what the reader makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import peft_moe_delta.recipe
from peft_moe_delta.errors import RecipeError
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.reader import laid_over, read_change, read_yaml

SCHEMA = json.loads((Path(peft_moe_delta.recipe.__file__).parent / "recipe.schema.json").read_text(encoding="utf-8"))
EXAMPLES = Path(__file__).parents[2] / "examples"
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "object": (dict,), "array": (list,),
}  # fmt: skip


def holds(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is what a schema says: the part of JSON Schema that ours uses, and an error for any other."""
    unknown = set(schema) - {
        "$schema", "title", "description", "default", "definitions", "$ref", "allOf", "anyOf", "enum", "type",
        "minLength", "minimum", "maximum", "items", "properties", "required", "additionalProperties",
    }  # fmt: skip
    assert not unknown, unknown
    if "$ref" in schema:
        return holds(SCHEMA["definitions"][schema["$ref"].removeprefix("#/definitions/")], value)
    right = all(holds(part, value) for part in schema.get("allOf", []))
    right &= "anyOf" not in schema or any(holds(part, value) for part in schema["anyOf"])
    right &= "enum" not in schema or value in schema["enum"]
    if not right or "type" not in schema:
        return right
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind in ("integer", "number"):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if kind == "array":
        return all(holds(schema["items"], item) for item in value)
    if kind == "object":
        return _holds_section(schema, value)
    return kind != "string" or len(value) >= schema.get("minLength", 0)


def _holds_section(schema: dict[str, Any], value: dict[str, Any]) -> bool:
    fields, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    known = all(holds(fields[name], item) for name, item in value.items() if name in fields)
    rest = [item for name, item in value.items() if name not in fields]
    return (
        known
        and set(schema.get("required", [])) <= set(value)
        and all(others is not False and holds(others, item) for item in rest)
    )


def test_our_own_recipes_hold(recipe_fields):
    assert holds(SCHEMA, recipe_fields)
    assert holds(SCHEMA, read_yaml(EXAMPLES / "demo.yaml"))


@pytest.mark.parametrize(
    "change",
    [
        "seed=3", "review=null", "calibrate=true", "calibrate=false", "calibrate={}", "graft.expert_scale={hu: 1}",
        "graft.expert_scale=0.5", "adapter.layers_to_transform=[0, 1]", "unseen={de: de.jsonl}", "precision=bf16",
        "tasks={}", "card=", "quick={expand: {steps: 1}, languages: {hu: {test: x}}, calibrate: false}",
        "seed=-1", "seed=4294967296", "seed=x", "expand.step=1", "expand.steps=0", "expand.steps=1.5", "languages=[en]",
        "adapter.layers_to_transform=[-1]", "adapter.layers_to_transform=1", "precision=fp8", "graft.by_context=maybe",
        "languages.hu={group: x}", "unseen={de: 1}", "calibrate.documents=1", "card={}", "nothing=1", "graft=true",
        "expand=null", "model=3", "model=''", "limits.test_tasks=true",
    ],
)  # fmt: skip
def test_editor_and_reader_agree(recipe_fields, write_recipe, change):
    changed = laid_over(copy.deepcopy(recipe_fields), read_change(change))
    try:
        read_recipe(write_recipe(changed))
    except RecipeError:
        accepted = False
    else:
        accepted = True
    assert holds(SCHEMA, changed) is accepted


@pytest.mark.parametrize("change", ["quick.expand.step=1", "quick.modle=x", "quick.expand.steps=many"])
def test_editors_check_the_section_quick_too(recipe_fields, write_recipe, change):
    changed = laid_over(recipe_fields, read_change(change))
    with pytest.raises(RecipeError):
        read_recipe(write_recipe(changed), quick=True)
    assert not holds(SCHEMA, changed)
