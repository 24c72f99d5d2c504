"""A card says what the files say, with the report's numbers and no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from evaluation.sample_report import sample_report
from hub.loopback import USER, LoopbackHub
from peft_moe_delta.cli import main
from peft_moe_delta.errors import CardError
from peft_moe_delta.hub import CardFacts, render_card, write_card

CARDS = Path(__file__).parents[2] / "model_cards"
PARENTS = {"org/base": "apache-2.0", "org/chat": "mit"}


@pytest.fixture
def facts(models) -> CardFacts:
    """Of the stock model."""
    return CardFacts.of(
        models["stock"],
        name="pico-hu",
        adapter=models["adapter"],
        base_model="org/base",
        post_trained="org/chat",
        parents=PARENTS,
        measured_as="ours",
    )


def metadata(card: str) -> dict:
    return ModelCard(card).data.to_dict()


def test_metadata_of_a_stock_model(facts):
    data = metadata(render_card(facts, sample_report()))
    assert data["base_model"] == ["org/base", "org/chat"] and data["base_model_relation"] == "merge"
    assert data["language"] == ["hu", "en", "fi", "az"]
    assert (data["license"], data["library_name"]) == ("apache-2.0", "transformers")


def test_the_model_index_holds_the_reports_numbers(facts):
    report = sample_report()
    found = ModelCard(render_card(facts, report)).data
    assert found.model_name == "pico-hu"
    ours = [score for score in report.scores if score.model == "ours"]
    assert [(r.metric_type, r.dataset_config, r.metric_value) for r in found.eval_results] == [
        (score.metric, score.language, score.value) for score in ours
    ]


def test_the_tables_show_every_score_and_difference(facts):
    report = sample_report()
    text = render_card(facts, report)
    for score in report.scores:
        assert f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" in text
    for difference in (d for d in report.differences if d.model == "ours"):
        assert f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" in text
    assert "| **ours** |" in text and "One seed." in text


def test_a_grafted_adapter_belongs_to_the_post_trained_model(models):
    grafted = CardFacts.of(models["grafted"], name="x", base_model="org/chat", parents=PARENTS)
    assert (grafted.kind, grafted.base_model, grafted.post_trained) == ("grafted adapter", None, "org/chat")
    data = metadata(render_card(grafted))
    assert (data["base_model"], data["base_model_relation"]) == (["org/chat"], "adapter")
    assert data["library_name"] == "peft"
    adapter = CardFacts.of(models["adapter"], name="x", base_model="org/base", parents=PARENTS)
    assert (adapter.kind, adapter.base_model, adapter.post_trained) == ("adapter", "org/base", None)
    assert adapter.adapter["routing"] == "learned" and adapter.languages["hu"] == "uralic"


def test_folders_of_this_machine_are_not_named(models):
    card = render_card(CardFacts.of(models["grafted"], name="x"))
    assert str(models["grafted"].parent) not in card
    assert "base_model" not in metadata(card)
    assert "The licence of a parent is not known" in card and metadata(card)["license"] == "unknown"


def test_a_laxer_licence_is_refused_wherever_it_comes_from(facts, models):
    with pytest.raises(CardError, match="claims the licence 'mit'"):
        CardFacts.of(models["adapter"], name="x", base_model="org/base", parents=PARENTS, licence="mit")
    with pytest.raises(CardError, match="claims the licence 'mit'"):
        CardFacts.from_json(replace(facts, licence="mit").to_json())


def test_facts_survive_their_file(facts):
    assert CardFacts.from_json(facts.to_json()) == facts
    with pytest.raises(CardError, match="Not the facts of a card"):
        CardFacts.from_json('{"name": "x"}')


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        ("nothing", True),
        ("no report", False),
        ("the routes were not compared", False),
        ("routing by language, which cannot drift", True),
        ("the routes drift", False),
        ("the text got worse for sure", False),
        ("no skill was measured", False),
        ("the skill fell for sure", False),
        ("the skill is undecided", False),
    ],
)
def test_a_card_claims_to_keep_only_what_was_measured_to_be_kept(facts, change, keeps):
    facts = replace(facts, languages={"en": "original", "hu": "new"})
    report = sample_report()
    skill = replace(report.differences[0], task="sorting", metric="exact_match", higher_is_better=True)
    bounds = {"the skill fell for sure": (-0.4, -0.2), "the skill is undecided": (-0.4, 0.1)}.get(change, (-0.01, 0.02))
    skills = [] if change == "no skill was measured" else [replace(skill, value=0.0, low=bounds[0], high=bounds[1])]
    low, high = (0.1, 0.3) if change == "the text got worse for sure" else (-0.005, 0.005)
    text = replace(report.differences[0], value=0.0, low=low, high=high)
    agreement = [replace(report.agreement[0], language="en")]
    warnings = ["Routes drift: 48%"] if change == "the routes drift" else []
    if change.startswith(("the routes were", "routing by")):
        agreement = []
    if change.startswith("routing by"):
        facts = replace(facts, adapter={**facts.adapter, "routing": "language"})
    report = replace(report, differences=[text, *skills], agreement=agreement, warnings=warnings)
    card = render_card(facts, None if change == "no report" else report)
    assert ("; en, which it spoke before, it keeps" in card) == keeps
    assert ("What became of en" in card) != keeps
    assert all(warning in card for warning in (warnings if change != "no report" else []))


def test_a_report_must_know_the_model(facts):
    with pytest.raises(CardError, match="called 'theirs' in no row.*'base', 'post-trained', 'ours'"):
        render_card(replace(facts, measured_as="theirs"), sample_report())


def test_a_streamed_graft_says_what_it_was_made_from_in_its_manifest(models, tmp_path):
    shutil.copy(models["stock"] / "config.json", tmp_path)
    report = {"post_trained": "org/chat", "scale": 1.0, "expert_scale": {"uralic": 0.5}, "max_logit_difference": None}
    request = {"base": "org/base", "post_trained": "org/chat", "adapter": str(models["adapter"])}
    (tmp_path / "manifest.json").write_text(json.dumps({"request": request, "report": report}))
    facts = CardFacts.of(tmp_path, name="x", base_model="org/base", parents=PARENTS)
    assert (facts.base_model, facts.post_trained, facts.licence) == ("org/base", "org/chat", "apache-2.0")
    assert facts.languages["hu"] == "uralic"
    assert "uralic 0.5" in render_card(facts)


def test_no_model_no_card(tmp_path):
    with pytest.raises(CardError, match="neither adapter_config.json nor config.json"):
        CardFacts.of(tmp_path, name="x")


def test_the_command_writes_a_card_and_makes_it_again(models, tmp_path, capsys):
    sample_report().save(tmp_path / "report")
    options = ["--adapter", models["adapter"], "--report", tmp_path / "report", "--measured-as", "ours"]
    options += ["--base-model", "org/base", "--parent", "org/base=mit", "--limit", "It is tiny.", "--name", "tiny"]
    main(["card", str(models["stock"]), *map(str, options), "--output", str(tmp_path / "card")])
    written = (tmp_path / "card/README.md").read_bytes()
    assert b"It is tiny." in written and str(tmp_path / "card/README.md") in capsys.readouterr().out
    (tmp_path / "card/README.md").write_text("spoilt")
    main(["card", str(tmp_path / "card")])
    assert (tmp_path / "card/README.md").read_bytes() == written
    with pytest.raises(SystemExit, match="--parent takes NAME=VALUE; got 'mit'"):
        main(["card", str(models["stock"]), "--parent", "mit"])


def test_a_card_written_beside_a_model_goes_to_the_hub_with_it(call, hub: LoopbackHub, facts, models, tmp_path):
    from hub import client

    write_card(tmp_path, facts, sample_report())
    extra = {path.name: path for path in tmp_path.iterdir()}
    call(client.push, str(models["stock"]), f"{USER}/with-card", extra_files=extra)
    files = hub.files(f"{USER}/with-card")
    assert {name: files[name] for name in extra} == {name: path.read_bytes() for name, path in extra.items()}
    assert call(client.card_metadata, f"{USER}/with-card")["license"] == "apache-2.0"


@pytest.mark.parametrize("folder", sorted(CARDS.glob("*/card.json")), ids=lambda path: path.parent.name)
def test_the_finished_cards_are_what_their_facts_give(folder, tmp_path):
    """`make cards` makes them again; here each is made beside the one that is kept."""
    main(["card", str(folder.parent), "--output", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == (folder.parent / "README.md").read_text()
    facts = json.loads(folder.read_text())
    assert "demo" in " ".join(facts["command"]) and facts["limits"]


def test_engines_in_which_it_was_verified(models, tmp_path, facts):
    assert "## Serving" not in render_card(facts)
    rows = [
        {"engine": "llama.cpp", "version": "b1", "form": "m-q8_0.gguf", "difference": 0.0213, "tolerance": 0.1},
        {"engine": "vllm", "version": "0.32", "form": "the export", "difference": None, "languages": ["en", "hu"]},
        {"engine": "other", "version": None, "form": "the export", "difference": None},
    ]
    text = render_card(replace(facts, served=rows))
    assert "| llama.cpp b1 | m-q8_0.gguf | 0.02, of 0.1 allowed |  | `llama-server -m m-q8_0.gguf` |" in text
    assert "| vllm 0.32 | the export | not compared | en, hu | `vllm serve user/pico-hu` |" in text
    assert "| other | the export | not compared |  |  |" in text


def test_what_was_verified_since_a_card_was_written_is_on_it(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["adapter"], folder)
    line = ["card", str(folder), "--parent", "org/base=mit", "--base-model", "org/base"]
    main(line)
    assert "## Serving" not in (folder / "README.md").read_text()
    row = {"engine": "peft-moe-delta", "version": "0.1.0", "form": "the export", "difference": 1e-6, "tolerance": 1e-3}
    (folder / "served.json").write_text(json.dumps({"verified": [row]}))
    main(line)
    assert "| `peft-moe-delta serve user/model` |" in (folder / "README.md").read_text()
    (folder / "served.json").write_text('{"verified": [1]}')
    with pytest.raises(SystemExit):
        main(line)
