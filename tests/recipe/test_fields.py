"""What a recipe file may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_moe_delta import ExpertPlan
from peft_moe_delta.errors import RecipeError
from peft_moe_delta.recipe import checks, read_recipe
from peft_moe_delta.recipe.reader import read_yaml
from peft_moe_delta.recipe.stages import settled_precision


def test_a_recipe_is_read_in_the_order_it_was_written(recipe_fields, write_recipe):
    recipe = read_recipe(write_recipe(recipe_fields))
    assert recipe.expanded_languages == ["hu", "el"]
    assert recipe.expand.steps == 2 and recipe.expand.learning_rate == 1e-3
    assert recipe.graft.expert_scale == "auto"


def test_routers_are_calibrated_unless_the_recipe_says_not_to_or_nobody_asks_them(recipe_fields, write_recipe):
    def calibration(**change):
        return checks.calibration(read_recipe(write_recipe(recipe_fields | change)))

    assert (calibration().documents, calibration(calibrate=True).documents) == (6, 100)
    assert calibration(calibrate=False) is calibration(calibrate=None) is None
    del recipe_fields["review"]
    assert calibration() is None, "routing by language"


def test_quick_is_laid_over_the_rest_field_by_field(recipe_fields, write_recipe):
    recipe = read_recipe(write_recipe(recipe_fields), quick=True)
    assert (recipe.expand.steps, recipe.expand.batch_size) == (1, 4)


def test_changes_come_last_and_are_yaml(recipe_fields, write_recipe):
    recipe = read_recipe(
        write_recipe(recipe_fields),
        quick=True,
        changes=["expand.steps=200", "expand.learning_rate=1e-5", "languages.hu.test=no", "review=", "unseen.no=a=b",
                 "adapter.layers_to_transform=[0, 1]", "calibrate=true", "calibrate.steps=0", "seed=1", "seed=012"],
    )  # fmt: skip
    assert (recipe.expand.steps, recipe.expand.batch_size, recipe.expand.learning_rate) == (200, 4, 1e-5)
    assert (recipe.languages["hu"].test, recipe.languages["hu"].group) == ("no", "hu_group")
    assert recipe.review is None and recipe.unseen == {"no": "a=b"} and recipe.seed == 12
    assert recipe.adapter.layers_to_transform == [0, 1]
    assert recipe.calibrate is not None and (recipe.calibrate.steps, recipe.calibrate.documents) == (0, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("expand.step=200", r"expand: unknown fields \['step'\]\. Did you mean steps\?"),
        ("langauges.hu.train=x", r"Did you mean languages\?"),
        ("expand.steps=many", "expand: steps must be a whole number"),
        ("model.name=x", "model must be text"),
        ("expand.steps", "--set takes FIELD=VALUE, such as expand.steps=200; got 'expand.steps'"),
        ("=3", "--set takes FIELD=VALUE"),
        ("expand..steps=3", "--set takes FIELD=VALUE"),
        ("seed=[", r"--set seed: '\[' is not YAML"),
        ("precision=fp16", 'must be "auto" or "bf16" or "fp32"; got \'fp16\'. Did you mean'),
    ],
)
def test_a_bad_change_is_refused(recipe_fields, write_recipe, change, message):
    with pytest.raises(RecipeError, match=message) as refused:
        read_recipe(write_recipe(recipe_fields), changes=[change])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"unknown fields \['modle'\]\. Did you mean model\? Known fields: model, output"),
        ({"nothing_like_it": "x"}, r"unknown fields \['nothing_like_it'\]\. Known fields: model, output"),
        ({"model": None}, "model must be text"),
        ({"model": ""}, "model must be text that is not empty"),
        (
            {"expand": {"steps": -3, "batch_size": 1, "learning_rate": 1.0}},
            "steps must be a whole number of at least 1; got -3",
        ),
        ({"expand": {"steps": 1, "batch_size": 0, "learning_rate": 1.0}}, "batch_size must be.* at least 1; got 0"),
        (
            {"expand": {"steps": 1, "batch_size": 1, "learning_rate": -1.0}},
            "learning_rate must be a finite number of at",
        ),
        ({"expand": {"steps": 1, "batch_size": 1, "learning_rate": float("nan")}}, "must be a finite number.*got nan"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"limits": {"test_documents": 0}}, "test_documents must be a whole number of at least 1"),
        (
            {"graft": {"expert_scale": {"hu_group": "half"}}},
            "expert_scale.hu_group must be a finite number; got 'half'",
        ),
        ({"graft": {"expert_scale": [1]}}, "must be a finite number or a section or text that is not empty"),
        (
            {"adapter": {"experts": {}, "layers_to_transform": ["0"]}},
            r"layers_to_transform\[0\] must be a whole number",
        ),
        ({"expand": {"steps": 1}}, r"expand: .*missing fields \['batch_size', 'learning_rate'\]"),
        (
            {"expand": {"steps": "many", "batch_size": 1, "learning_rate": 1.0}},
            "steps must be a whole number.*; got 'many'",
        ),
        ({"languages": ["en"]}, "languages must be"),
        ({"post_trained": "x"}, "either `post_trained`.*or `tune`"),
        ({"calibrate": {"documents": 1}}, "documents must be a whole number of at least 2; got 1"),
        ({"calibrate": "no"}, "calibrate must be a section"),
        ({"precision": "fp8"}, "precision.*bf16.*fp8"),
    ],
)
def test_a_bad_field_is_named(recipe_fields, write_recipe, change, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write_recipe({**recipe_fields, **change}))


@pytest.mark.parametrize(
    ("matrix_units", "used", "precision"),
    [(True, "AVX512", "bf16"), (True, "DEFAULT", "fp32"), (True, "AVX2", "fp32"), (False, "AVX512", "fp32")],
)
def test_the_faster_precision_is_chosen(monkeypatch, matrix_units, used, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": matrix_units}, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settled_precision("auto") == precision


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a", "must hold fields"),
        ("", "must hold"),
        ("a: 1\na: 2", "'a' comes twice; keep one of them.*line 2"),
        ("a: {b: 1, b: 1}", "'b' comes twice"),
        ("? [a]\n: b", "expected text as a key"),
        ("a: &a [*a]", "recursive"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: 1\n---\nb: 1", "expected a single document"),
        ("a: " + "[" * 5000, "recursion"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as refused:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"Cannot read .*nowhere\.yaml: No such file"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_yaml_is_read_as_version_1_2_has_it(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "no: NO\n~: {on: off}\n1: 012\nfloats: [1e-3, .5, -4E+2, 1., .inf]\ndate: 2026-01-01\ntime: 1:30\n"
        "sizes: [0o14, 0xff, +3, 1_000]\nnothing: [~, null, ]\ntrue: [true, True, yes]\nsame: &x 1\nagain: *x\n",
        encoding="utf-8",
    )
    assert read_yaml(tmp_path / "a.yaml") == {
        "no": "NO",
        "~": {"on": "off"},
        "1": 12,
        "floats": [1e-3, 0.5, -400.0, 1.0, float("inf")],
        "date": "2026-01-01",
        "time": "1:30",
        "sizes": [12, 255, 3, "1_000"],
        "nothing": [None, None],
        "true": [True, True, "yes"],
        "same": 1,
        "again": 1,
    }


def test_a_recipe_may_be_about_norwegian_and_write_numbers_as_yaml_does(recipe_fields, write_recipe):
    recipe_fields["languages"] = {"no": recipe_fields["languages"]["hu"], **recipe_fields["languages"]}
    path = write_recipe(recipe_fields)
    text = Path(path).read_text().replace("'no':", "no:").replace("learning_rate: 0.001", "learning_rate: 1e-3")
    Path(path).write_text(text)
    recipe = read_recipe(path)
    assert list(recipe.languages) == ["no", "en", "hu", "el"]
    assert recipe.expand.learning_rate == 1e-3
