"""`peft-moe-delta grow`: an adapter and a file in, a grown adapter out; and where new experts had better start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from builders import logits, token_batch, upcycle
from peft_moe_delta import fit_identifier, fit_routers
from peft_moe_delta.cli import main
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import closest_group, score_groups
from peft_moe_delta.identifier import recognised_languages
from peft_moe_delta.recipe import foresight
from peft_moe_delta.sources import read_texts
from peft_moe_delta.tuner.identifier import Identifiers
from recipe.pico_recipe import SENTENCES

TRAINING = {"steps": 2, "batch_size": 3, "learning_rate": 1.0e-2, "sequence_length": 16}


@pytest.fixture
def files(recipe_fields, tmp_path):
    """A trained adapter for English and Hungarian on disk, and the fields of a file that adds Greek."""
    model = upcycle(
        AutoModelForCausalLM.from_pretrained(recipe_fields["model"]),
        trained=True,
        languages={"hu": "uralic", "en": "original"},
        experts={"uralic": 1},
    )
    model.save_pretrained(tmp_path / "adapter")
    groups = {"hu": "uralic", "en": "original", "el": "greek"}
    return {
        "adapter": str(tmp_path / "adapter"),
        "output": str(tmp_path / "grown"),
        "languages": {c: {"group": g, "train": recipe_fields["languages"][c]["train"]} for c, g in groups.items()},
        "experts": {"greek": 1},
        "precision": "fp32",
    }


def run(fields, tmp_path, *more):
    path = tmp_path / "grow.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    main(["grow", str(path), *more])


def load(recipe_fields, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe_fields["model"]), folder)


def test_an_adapter_grows_untrained(files, recipe_fields, tmp_path, capsys):
    run(files, tmp_path)
    assert capsys.readouterr().out == f"adapter: {files['output']}\n"
    before, after = load(recipe_fields, files["adapter"]), load(recipe_fields, files["output"])
    for code in ("hu", "en"):
        assert torch.equal(logits(after, token_batch(), language=code), logits(before, token_batch(), language=code))
    assert after.active_peft_config.record.language_ids == ("hu", "en", "el")
    assert json.loads((Path(files["adapter"]) / "adapter_config.json").read_text())["record"]["growth"] == []


@pytest.mark.filterwarnings("ignore:An expert has seen:UserWarning")
def test_an_adapter_that_reads_its_text_learns_to_read_the_new_language(files, recipe_fields, tmp_path):
    """What it knows of the others' tokens stays as it was."""
    model = upcycle(
        AutoModelForCausalLM.from_pretrained(recipe_fields["model"]),
        trained=True,
        languages={"hu": "uralic", "en": "original"},
        experts={"uralic": 1},
        routing="context",
    )
    tokenizer = AutoTokenizer.from_pretrained(recipe_fields["model"])
    fit_identifier(model, {code: [SENTENCES[code]] * 5 for code in ("en", "hu")}, tokenizer, memory=20)
    model.save_pretrained(files["adapter"])
    run(files, tmp_path)
    before, after = (
        Identifiers.counts_of(load(recipe_fields, files[name]).get_base_model(), "default")
        for name in ("adapter", "output")
    )
    assert list(after) == ["en", "hu", "el"] and all(torch.equal(after[code], before[code]) for code in before)
    grown = load(recipe_fields, files["output"])
    assert grown.active_peft_config.record.identifier.memory == 20
    ids = tokenizer(SENTENCES["el"], return_tensors="pt")["input_ids"]
    assert recognised_languages(grown, ids)[0][-1] == "el"


def test_an_adapter_grows_trained_and_reviewed(files, recipe_fields, tmp_path):
    files |= {"start_from": "closest", "expand": TRAINING | {"routing": "language"}, "review": TRAINING}
    files["review"] = TRAINING | {"routing": "learned"}
    run(files, tmp_path)
    before, after = load(recipe_fields, files["adapter"]), load(recipe_fields, files["output"])
    assert after.active_peft_config.record.stage == "review"
    assert after.active_peft_config.record.open_steps == 1
    for old, new in zip(before.layers().values(), after.layers().values(), strict=True):
        assert torch.equal(old.router("default").weight, new.router("default").weight)
        for name, tensor in old.experts("default")[1].state_dict().items():
            assert torch.equal(new.experts("default")[1].state_dict()[name], tensor)
    after.remove_group("greek")
    assert torch.equal(logits(after, token_batch()), logits(before, token_batch()))


def test_a_review_starts_from_rows_in_closed_form(files, recipe_fields, tmp_path):
    files["review"] = TRAINING | {"routing": "learned", "learning_rate": 0.0}
    run(files, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(recipe_fields["model"])
    texts = {code: read_texts(language["train"]) for code, language in files["languages"].items()}
    expected = load(recipe_fields, files["adapter"])
    expected.add_languages({"el": "greek"}, {"greek": 1})
    fit_routers(expected, texts, tokenizer, only="newest", max_length=TRAINING["sequence_length"])
    found = load(recipe_fields, files["output"])
    for ours, theirs in zip(found.layers().values(), expected.layers().values(), strict=True):
        rows, same = (layer.router("default").grown_2 for layer in (ours, theirs))
        assert rows.any()
        torch.testing.assert_close(rows, same, atol=1e-4, rtol=1e-4)


def test_a_dry_run_says_what_would_grow_and_grows_nothing(files, tmp_path, capsys):
    files |= {"start_from": "closest", "expand": TRAINING, "review": TRAINING}
    run(files, tmp_path, "--dry-run", "--time")
    printed = capsys.readouterr().out
    assert "Languages that are added: el (greek)." in printed and "experts of greek" in printed
    assert re.search(r"^expand +experts of greek +96 tokens$", printed, re.MULTILINE)
    assert re.search(r"a pass of the expansion took \S+ s, .* so its 2 take about .* seconds", printed)
    assert not Path(files["output"]).exists()
    run({name: value for name, value in files.items() if name not in ("expand", "review")}, tmp_path, "--dry-run")
    assert "Nothing trains" in capsys.readouterr().out


def test_a_dry_run_lists_all_that_stands_in_the_way(files, tmp_path):
    (tmp_path / "short.txt").write_text("rövid\n", encoding="utf-8")
    files |= {"expand": TRAINING, "review": TRAINING}
    files["languages"]["el"]["train"] = str(tmp_path / "short.txt")
    files["languages"]["hu"]["train"] = str(tmp_path / "nowhere.txt")
    with pytest.raises(SystemExit, match=r"2 faults.*languages\.el\.train.*expand needs 96.*hu\.train: No file"):
        run(files, tmp_path, "--dry-run")
    del files["languages"]["hu"]
    with pytest.raises(SystemExit, match="none of uralic"):
        run(files, tmp_path, "--dry-run")
    with pytest.raises(SystemExit, match="gives counts to uralic"):
        run(files | {"experts": {"uralic": 1}}, tmp_path, "--dry-run")
    with pytest.raises(SystemExit, match="--time belongs to --dry-run"):
        run(files, tmp_path, "--time")


@pytest.mark.parametrize(("removed", "named"), [("review", "expand"), ("expand", "review")])
def test_a_training_that_memory_cannot_hold_is_named(files, tmp_path, monkeypatch, removed, named):
    monkeypatch.setattr(foresight, "memory_here", lambda: 1000)
    files |= {"expand": TRAINING, "review": TRAINING}
    del files[removed]
    with pytest.raises(
        SystemExit, match=rf"{named}: its training takes .*B of memory, .* 1\.0 kB\. Lower {named}\.batch"
    ):
        run(files, tmp_path, "--dry-run")


def test_a_review_needs_text_of_every_group(files, tmp_path):
    del files["languages"]["hu"]
    with pytest.raises(SystemExit, match="none of uralic"):
        run(files | {"review": TRAINING}, tmp_path)
    assert not Path(files["output"]).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {}}, "brings the new groups"),
        ({"experts": {"uralic": 1, "greek": 1}}, "which the adapter has already"),
        ({"steps": 3}, "unknown fields"),
        ({"precision": "fp8"}, "precision"),
        ({"start_from": "slavic"}, "start_from='slavic'"),
        ({"expand": TRAINING | {"steps": 5000}}, "Bring more text"),
        ({"expand": TRAINING, "review": TRAINING | {"steps": 5000}}, "Bring more text"),
        ({"expand": TRAINING, "review": TRAINING | {"language_prior_groups": ["grek"]}}, "names .'grek'."),
        ({"expand": TRAINING, "review": TRAINING | {"routing": "lerned"}}, "Unknown routing 'lerned'"),
    ],
)
def test_bad_files_are_refused_before_anything_is_trained_and_leave_nothing(
    change, message, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(Trainer, "train", lambda *arguments: pytest.fail("trained before the file was checked"))
    with pytest.raises(SystemExit, match=message):
        run(files | change, tmp_path)
    assert not Path(files["output"]).exists()


def test_no_file(tmp_path):
    with pytest.raises(SystemExit, match="Cannot read .*none.yaml"):
        main(["grow", str(tmp_path / "none.yaml")])


def test_the_closest_group_writes_the_text_in_the_fewest_bits(recipe_fields, holds):
    """Hungarian's expert is tuned on Hungarian, so Hungarian text is closest to it, and its figure is its own."""
    tokenizer = AutoTokenizer.from_pretrained(recipe_fields["model"])
    model = upcycle(
        AutoModelForCausalLM.from_pretrained(recipe_fields["model"]),
        languages={"hu": "uralic", "en": "original", "el": "greek"},
        experts={"uralic": 1, "greek": 1},
    )
    with model.base_model.in_routing("language"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batch = tokenizer([SENTENCES["hu"]], return_tensors="pt")
        for _ in range(10):
            optimizer.zero_grad()
            model.train()(**batch, labels=batch["input_ids"], language="hu").loss.backward()
            optimizer.step()
    scores = score_groups(model.eval(), tokenizer, [SENTENCES["hu"]])
    assert closest_group(model, tokenizer, [SENTENCES["hu"]]) == "uralic"
    holds(scores["uralic"] - scores["original"], below=0)
    assert scores["original"] == scores["greek"], "an untrained expert is expert 0"
    assert model.active_peft_config.routing == "learned"
    with pytest.raises(DataError, match="got nothing"):
        closest_group(model, tokenizer, [])
