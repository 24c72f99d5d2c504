"""A whole recipe on a pico model, through the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_moe_delta.cli import main
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import EvalReport
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.data import held_out
from peft_moe_delta.recipe.fields import Limits
from peft_moe_delta.recipe.preview import seen_steps
from peft_moe_delta.recipe.reporting import OURS
from peft_moe_delta.recipe.run import Run
from recipe.pico_recipe import write_lines


def test_the_whole_job(recipe_fields, write_recipe, capsys):
    recipe = write_recipe(recipe_fields)
    main(["run", recipe])
    printed = capsys.readouterr().out
    for row in ("base", "post-trained", "dense continual", "**ours, grafted**"):
        assert f"| {row}" in printed
    output = Path(recipe_fields["output"])
    report = EvalReport.load(output / "report")
    hungarian = next(c for c in report.columns() if c.language == "hu")
    score = report.score(OURS, hungarian)
    assert score.low <= score.value <= score.high
    found = json.loads((output / "scores/grafted/findings.json").read_text())["items"]
    (kept_bits,) = (one for one in found if one["language"] == "hu" and one["metric"] == "bits_per_byte")
    assert score.value == sum(kept_bits["values"]) / sum(kept_bits["weights"])  # nothing is scored twice
    assert (score.items, score.tokens) == (len(kept_bits["values"]), kept_bits["tokens"])
    assert f"{score.value:.3f} [{score.low:.3f}" in printed
    assert report.difference(OURS, "post-trained", hungarian) is not None
    assert {row.language for row in report.routing} == {"en", "hu", "el"}
    assert report.routing[0].experts == ["expert 0", "hu_group", "el_group"]
    assert [(row.language, row.kind) for row in report.agreement][:3] == [(code, "text") for code in ("en", "hu", "el")]
    assert {row.reference for row in report.agreement} == {"its adapter before the graft"}
    assert [row.language for row in report.agreement if row.kind == "chat"] == ["en"]
    assert all(list(row.answers) == [model.name for model in report.models] for row in report.generations)
    assert (output / "report/report.html").is_file()
    assert (output / "report/figures/frontier.png").is_file()

    stock = AutoModelForCausalLM.from_pretrained(output / "grafted")
    assert stock.config.model_type == "mixtral"
    assert AutoTokenizer.from_pretrained(output / "grafted").chat_template == "{{ messages }}"
    graft = json.loads((output / "grafted/graft.json").read_text())
    assert graft["reload"]["architecture"] == "MixtralForCausalLM"
    assert graft["calibration"]["conversations"] == 4
    assert {row["kind"] for row in graft["calibration"]["after"]} == {"text", "chat"}
    assert set(graft["calibration"]["doubts"]) <= set(report.warnings)
    assert len(json.loads((output / "grafted/conversations.json").read_text())) == 16
    dense = json.loads((output / "dense_grafted/graft.json").read_text())
    for chosen in (graft, dense):  # the baseline's share is chosen as ours is
        assert [share for share, _ in chosen["trials"]] == [0.25, 0.5, 0.75, 1.0]
    assert dense["expert_scale"] == max(dense["trials"], key=lambda trial: trial[1])[0]

    card = output / "cards/pico/README.md"
    assert f"A model card: {card}" in printed
    assert all(card.read_text().count(doubt) == 1 for doubt in graft["calibration"]["doubts"])
    metadata = ModelCard.load(card).data
    assert (metadata.license, metadata.base_model, metadata.language) == ("mit", ["org/base"], ["en", "hu", "el"])
    rows = {row.dataset_config or row.dataset_name: row.metric_value for row in metadata.eval_results}
    assert rows == {(column.language or column.task): report.score(OURS, column).value for column in report.columns()}
    facts = json.loads((output / "cards/pico/card.json").read_text())
    assert [row["stage"] for row in facts["training"]] == ["post-training", "expansion", "review"]
    assert all("last_loss" in row for row in facts["training"])
    assert str(output.parent) not in card.read_text() + json.dumps(facts)
    assert "adapter" in (output / "cards/pico-adapter/README.md").read_text()

    kept = {file: file.stat().st_mtime_ns for file in output.rglob("step.json")}
    main(["run", recipe])
    assert {file: file.stat().st_mtime_ns for file in output.rglob("step.json")} == kept
    assert printed == capsys.readouterr().out

    recipe_fields["languages"]["hu"]["test"] = recipe_fields["languages"]["hu"]["validation"]
    again = {s.name: s.state for s in seen_steps(read_recipe(write_recipe(recipe_fields)), whole=True) if s.reason}
    assert set(again) == {"drift", *(f"scores/{name}" for name in ("base", "post_trained", "dense_grafted", "grafted"))}
    assert set(again.values()) == {"runs again, since the content of languages.hu.test has changed"}


def test_experts_over_the_post_trained_model_itself(recipe_fields, write_recipe, capsys):
    fields = {name: value for name, value in recipe_fields.items() if name not in ("tune", "dense")}
    recipe = write_recipe({**fields, "post_trained": fields["model"], "graft": {}})
    main(["run", recipe, "--dry-run"])
    assert "over the post-trained model itself, so no delta is grafted" in capsys.readouterr().out
    main(["run", recipe])
    output = Path(fields["output"])
    graft = json.loads((output / "grafted/graft.json").read_text())
    assert not [doubt for doubt in graft["warnings"] if "equal" in doubt]
    own = AutoModelForCausalLM.from_pretrained(fields["model"]).state_dict()
    stock = AutoModelForCausalLM.from_pretrained(output / "grafted").state_dict()
    assert all(stock[name].equal(own[name]) for name in stock if "self_attn" in name or "embed" in name)
    report = EvalReport.load(output / "report")
    kept = next(column for column in report.columns() if column.language == "en")
    assert report.score("post-trained", kept).value == report.score("base", kept).value


def test_routing_by_context_is_fitted_and_shipped_as_remote_code(recipe_fields, write_recipe, capsys):
    """Nothing names a language after the training, neither in scoring nor in the checkpoint."""
    recipe_fields["adapter"]["routing"] = "context"
    del recipe_fields["review"], recipe_fields["dense"]
    with pytest.raises(SystemExit) as stopped:
        main(["run", write_recipe(recipe_fields)])
    assert "remote_code: true" in str(stopped.value)
    recipe_fields["graft"] = {"remote_code": True}
    with pytest.warns(UserWarning, match="'hu'.*are recognised"):  # the tokens are bytes, and both use the same
        main(["run", write_recipe(recipe_fields)])
    output = Path(recipe_fields["output"])
    fitted = json.loads((output / "identified/identifier.json").read_text())
    assert set(fitted["recognised"]) == {"en", "hu", "el"} and fitted["recognised"]["el"] > 0.5
    saved = json.loads((output / "identified/adapter_config.json").read_text())["record"]["identifier"]
    assert saved["languages"] == ["en", "hu", "el"] and saved["memory"] == fitted["memory"]
    shipped = json.loads((output / "grafted/config.json").read_text())
    assert shipped["architectures"] == ["MoeDeltaContextForCausalLM"]
    report = EvalReport.load(output / "report")
    greek = next(row for row in report.routing if row.language == "el")
    assert greek.shares[0][2] > 0.3  # the Greek expert's, found without being told
    assert "context" in (output / "cards/pico-adapter/README.md").read_text()


def test_held_out_documents_are_drawn_at_random_and_cut(tmp_path):
    path = write_lines(tmp_path / "text.jsonl", [{"text": f"{index:02}" + "é" * 30} for index in range(50)])
    limits = Limits(document_bytes=11)
    drawn = [held_out(path, "hu", limits, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(set(drawn[0])) and len(drawn[0]) == 10, "in the file's order, none twice"
    assert max(int(text[:2]) for text in drawn[0]) >= 20, "not just the first"
    assert {text[2:] for text in drawn[0]} == {"é" * 4}, "no half characters"
    assert len(held_out(path, "hu", Limits(), 100, 0)) == 50


def test_train_alone_stops_at_the_adapter(recipe_fields, write_recipe, capsys):
    main(["train", write_recipe(recipe_fields), "--quick"])
    folder = Path(capsys.readouterr().out.strip().removeprefix("adapter: "))
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (Path(recipe_fields["output"]) / "grafted").exists()


def test_an_error_is_one_clear_message_and_exit_status_one(recipe_fields, write_recipe):
    recipe_fields["languages"]["hu"]["group"] = "nobody"
    with pytest.raises(SystemExit, match=r"error: `experts` names the groups"):
        main(["train", write_recipe(recipe_fields)])
    assert not (Path(recipe_fields["output"]) / "expanded").exists()


def test_a_step_depends_on_what_it_reads_and_on_nothing_else(recipe_fields, write_recipe, caplog):
    """A changed tokenizer file trains again, and says so; a changed test set trains nothing."""

    def ran():
        caplog.clear()
        run = Run(read_recipe(write_recipe(recipe_fields)), overwrite=True)
        run.expanded()
        run._scores("base", "base", run.base_model, run.base())
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    assert ran() == []
    model, hungarian = Path(recipe_fields["model"]), recipe_fields["languages"]["hu"]
    hungarian["test"] = hungarian["validation"]
    assert ran() == ["scores/base: runs again, since the content of languages.hu.test has changed"]
    Path(hungarian["validation"]).rename(model.parent / "renamed.jsonl")
    hungarian["validation"] = hungarian["test"] = str(model.parent / "renamed.jsonl")
    assert ran() == [], "the same text under another name"
    (model / "merges.txt").write_text("a b")
    assert ran() == [
        "base: runs again, since model.merges.txt is new",
        "expanded: runs again, since base is another",
        "scores/base: runs again, since model is another",
    ]
    recipe_fields["languages"] = dict(reversed(recipe_fields["languages"].items()))
    assert ran()[0].startswith("expanded: runs again, since order of languages was ['hu', 'el'] and is")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "short"}\n', "Bring more text"),
        ('{"txt": "x"}\n', "line 1: expected a `text`"),
        ("not json\n", "line 1: expected a JSON object"),
        ("", "is empty"),
        (None, "No file"),
    ],
)
def test_bad_text_is_named(recipe_fields, write_recipe, content, message):
    file = Path(recipe_fields["languages"]["hu"]["train"])
    run = Run(read_recipe(write_recipe(recipe_fields)))
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        run.expanded()
