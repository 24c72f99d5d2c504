"""What a recipe file may say."""

from __future__ import annotations

import pytest
import torch

from peft_moe_delta import ExpertPlan
from peft_moe_delta.errors import RecipeError
from peft_moe_delta.recipe import read_recipe


def test_a_recipe_is_read_in_the_order_it_was_written(recipe_fields, write_recipe):
    recipe = read_recipe(write_recipe(recipe_fields))
    assert recipe.expanded_languages == ["hu", "el"]
    assert recipe.expand.steps == 2 and recipe.expand.learning_rate == 1e-3
    assert recipe.graft.expert_scale == "auto"


def test_quick_is_laid_over_the_rest_field_by_field(recipe_fields, write_recipe):
    recipe = read_recipe(write_recipe(recipe_fields), quick=True)
    assert (recipe.expand.steps, recipe.expand.batch_size) == (1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"unknown fields \['modle'\]"),
        ({"model": None}, "model must be str"),
        ({"expand": {"steps": 1}}, r"expand: .*missing fields \['batch_size', 'learning_rate'\]"),
        ({"expand": {"steps": "many", "batch_size": 1, "learning_rate": 1.0}}, "steps must be int; got 'many'"),
        ({"expand": {"steps": 1, "batch_size": 1, "learning_rate": "4e-4"}}, "learning_rate must be float; got '4e-4'"),
        ({"languages": ["en"]}, "languages must be"),
        ({"post_trained": "x"}, "either `post_trained`.*or `tune`"),
        ({"precision": "fp8"}, "precision.*bf16.*fp8"),
    ],
)
def test_a_bad_field_is_named(recipe_fields, write_recipe, change, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write_recipe({**recipe_fields, **change}))


@pytest.mark.parametrize(("matrix_units", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_faster_precision_is_chosen(recipe_fields, write_recipe, monkeypatch, matrix_units, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": matrix_units}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_recipe(write_recipe(recipe_fields | {"precision": "auto"})).precision == precision


def test_experts_may_be_the_file_of_a_plan(recipe_fields, write_recipe, tmp_path):
    plan = ExpertPlan.build((0, 1), ("original", "hu_group", "el_group"), {"hu_group": [2, 0], "el_group": 1})
    (tmp_path / "plan.json").write_text(plan.to_json())
    recipe_fields["adapter"]["experts"] = str(tmp_path / "plan.json")
    adapter = read_recipe(write_recipe(recipe_fields)).adapter
    assert adapter.experts == {"hu_group": [2, 0], "el_group": [1, 1]} and adapter.layers_to_transform is None
    recipe_fields["adapter"]["layers_to_transform"] = [0]
    with pytest.raises(RecipeError, match="knows its layers"):
        read_recipe(write_recipe(recipe_fields))
    recipe_fields["adapter"] = {"experts": "nowhere.json"}
    with pytest.raises(RecipeError, match="or the file of a plan"):
        read_recipe(write_recipe(recipe_fields))


def test_quick_needs_its_section(recipe_fields, write_recipe):
    del recipe_fields["quick"]
    with pytest.raises(RecipeError, match="no section `quick`"):
        read_recipe(write_recipe(recipe_fields), quick=True)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- a", "must hold fields"), ("", "must hold")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"No recipe at .*nowhere\.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")
