"""What cannot be carried out to its end is refused before anything is trained; what `graft:` asks for is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from builders import perturbed
from peft_moe_delta.cli import main
from peft_moe_delta.evaluation import EvalReport
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.reporting import OURS, OURS_BY_CONTEXT, POST_TRAINED
from peft_moe_delta.recipe.run import Run
from recipe.pico_recipe import pico_tokenizer, write_lines

TRAINING = {"steps": 2, "batch_size": 4, "learning_rate": 1.0e-3, "sequence_length": 16}
EXPERTS = {"hu_group": 1, "el_group": 1}
LANGUAGE_ROUTING = {"experts": EXPERTS, "routing": "language"}
CONTEXT = {"experts": EXPERTS, "routing": "context"}
CLASSIFIER = {"experts": EXPERTS, "routing": "classifier"}
LAX = {"name": "a", "parents": {"org/base": "cc-by-nc-4.0"}, "base_model": "org/base", "licence": "mit"}


@pytest.fixture
def fields(recipe_fields):
    """A recipe that brings its post-trained model, so that little is trained."""
    folder = Path(recipe_fields["model"]).with_name("post_trained")
    perturbed(AutoModelForCausalLM.from_pretrained(recipe_fields["model"]), scale=0.05).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    for name in ("tune", "dense", "card"):
        del recipe_fields[name]
    return recipe_fields | {"post_trained": str(folder), "graft": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"experts": {"hu_group": [2, 1], "el_group": 1}}}, r"graft: .*\[4, 3\].*remote_code: true"),
        ({"adapter": LANGUAGE_ROUTING, "review": None}, r"after training, routing is 'language'.*graft: {language"),
        (
            {"adapter": LANGUAGE_ROUTING, "review": None, "graft": {"remote_code": True}},
            "neither a stand-alone model nor its scores name a language",
        ),
        (
            {"review": {**TRAINING, "routing": "learned"}, "graft": {"language": "hu"}},
            "every language uses all experts",
        ),
        ({"adapter": LANGUAGE_ROUTING, "review": None, "graft": {"language": "de"}}, "Unknown language 'de'"),
        (
            {"adapter": {**CLASSIFIER, "classifier_layers": [1]}, "review": None},
            "routing 'classifier', in the layers",
        ),
        (
            {"adapter": CLASSIFIER},
            "needs `classifier_layers`",
        ),
        ({"review": {**TRAINING, "language_prior_groups": ["orignal"]}}, "names .'orignal'.; the groups are"),
        ({"review": {**TRAINING, "routing": "lerned"}}, "Unknown routing 'lerned'"),
        (
            {"review": {**TRAINING, "routing": "learned", "steps": 5000}},
            "en.train.jsonl has .* tokens.*Bring more text",
        ),
        ({"graft": {"expert_scale": {"hungarian": 0.5}}}, "graft: expert_scale must be.*over hu_group, el_group"),
        ({"graft": {"expert_scale": "half"}}, "expert_scale must be"),
        ({"adapter": {"experts": {"hu": 1, "el_group": 1}}}, "names the groups"),
        ({"adapter": {"experts": {"hu_group": 1, "el_group": 1}, "top_k": 9}}, "top_k=9 exceeds 3"),
        ({"adapter": {"experts": {"hu_group": [1, 1, 1], "el_group": 1}}}, "lists 3 counts.*2 transformed"),
        ({"expand": {**TRAINING, "sequence_length": 4096}}, "sequence_length is 4096, and .* has 1024 positions"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but .* has 2 layers"),
        ({"num_hidden_layers": 1}, "its num_hidden_layers is 2, that of the base model 1.*cuts the base model alone"),
        ({"model": "/nowhere"}, "Cannot load a config of a model from '/nowhere'"),
        ({"post_trained": "/nowhere"}, "Cannot load a config of a model from '/nowhere'"),
        ({"card": LAX}, "licence"),
        (
            {"adapter": CONTEXT, "review": None, "graft": {"by_context": True, "remote_code": True}},
            "that already. Remove",
        ),
        ({"unseen": {"hun": "de.jsonl"}}, "unseen: hun is among the languages"),
        ({"unseen": {"de": "nowhere.jsonl"}}, "nowhere.jsonl"),
    ],
    ids=str,
)
def test_a_dead_end_is_seen_before_the_first_step(fields, write_recipe, change, message, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *arguments: pytest.fail("trained before the recipe was checked"))
    fields = {name: value for name, value in {**fields, **change}.items() if value is not None}
    with pytest.raises(SystemExit, match=message) as refused:
        main(["run", write_recipe(fields)])
    assert str(refused.value).startswith("error: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize(("file", "split"), [("hu", "test"), ("en", "validation"), ("en", "train")])
@pytest.mark.parametrize("content", ["not json", None])
def test_files_that_a_later_step_reads_are_checked_first(fields, write_recipe, monkeypatch, file, split, content):
    monkeypatch.setattr(Trainer, "train", lambda *arguments: pytest.fail("trained before the recipe was checked"))
    path = Path(fields["languages"][file][split])
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"{file}.{split}"):
        main(["run", write_recipe(fields)])


def test_the_adapter_can_be_trained_where_nothing_stock_holds_it(fields, write_recipe, monkeypatch):
    fields["adapter"] = LANGUAGE_ROUTING
    del fields["review"]
    assert (Run(read_recipe(write_recipe(fields))).adapter().folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("calibrate", [{"documents": 6, "conversations": 3, "steps": 1}, False], ids=str)
def test_a_graft_is_calibrated_where_the_recipe_wants_it(fields, write_recipe, calibrate):
    """With `false` its routers are the reviewed adapter's own, and its routes are measured on chat all the same."""
    run = Run(read_recipe(write_recipe(fields | {"calibrate": calibrate})))
    graft = json.loads((run.grafted().folder / "graft.json").read_text())
    routers = [read_routers(folder) for folder in (run.adapter().folder, run.grafted().folder)]
    same = all(torch.equal(adapter, stock) for adapter, stock in zip(*routers, strict=True))
    assert routers[0] and len(json.loads((run.grafted().folder / "conversations.json").read_text())) == 16
    if calibrate is False:
        assert graft["calibration"] is None and same
    else:
        assert graft["calibration"]["conversations"] == 3
        assert same == (graft["calibration"]["kept"] == "before")


def test_by_context_is_a_second_form_of_the_same_graft(fields, write_recipe, tmp_path):
    """It has the same experts, reads the language by itself, and is scored beside the stock form, as are languages that
    nobody named."""
    unseen = write_lines(
        tmp_path / "de.jsonl", [{"text": f"zwei boxkaempfer jagen eva quer durch sylt {n}"} for n in range(3)]
    )
    fields |= {"graft": {"expert_scale": "auto", "by_context": True}, "unseen": {"de": unseen}}
    with pytest.warns(UserWarning, match="'hu'.*are recognised"):  # the tokens are bytes, and both use the same
        main(["run", write_recipe(fields)])
    output = Path(fields["output"])
    stock, own = (json.loads((output / name / "graft.json").read_text()) for name in ("grafted", "by_context"))
    assert own["expert_scale"] == stock["expert_scale"] and own["calibration"] is None
    assert own["reload"]["architecture"] == "MoeDeltaContextForCausalLM"
    report = EvalReport.load(output / "report")
    assert report.languages["de"] == "unseen"
    bits = {c.language: c for c in report.columns() if c.metric == "bits_per_byte"}
    assert set(bits) == {"en", "hu", "el", "de"}
    assert report.difference(OURS, OURS_BY_CONTEXT, bits["hu"]) is not None
    english = report.difference(OURS_BY_CONTEXT, POST_TRAINED, bits["en"])
    assert english.value == 0, "recognised text of an original language runs on the post-trained model"


def read_routers(folder):
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    named = (name for name in sorted(weights) if "moe_delta_router" in name or name.endswith(".gate.weight"))
    return [weights[name] for name in named]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "review", "graft", "kind"),
    [
        (
            {"experts": {"hu_group": [2, 1], "el_group": 1}, "routing": "classifier", "classifier_layers": [1]},
            {**TRAINING, "routing": "classifier"},
            {"remote_code": True},
            "moe_delta_llama",
        ),
        (LANGUAGE_ROUTING, None, {"language": "hu"}, "llama"),
    ],
    ids=["remote code", "one language"],
)
def test_a_recipe_ships_what_graft_asks_for(fields, write_recipe, adapter, review, graft, kind):
    fields |= {"adapter": adapter, "graft": graft}
    fields = {name: value for name, value in {**fields, "review": review}.items() if value is not None}
    fields["tasks"] = {}
    report = Run(read_recipe(write_recipe(fields))).report()
    assert OURS in [model.name for model in report.models]
    assert EvalReport.load(Path(fields["output"]) / "report").scores
    config = json.loads((Path(fields["output"]) / "grafted" / "config.json").read_text())
    assert config["model_type"] == kind
