"""`measure`, `group` and `allocate` from the command line, each reading what the one before wrote."""

import json
from pathlib import Path

import pytest
import yaml
from peft import get_peft_model

from allocation.measured import STATISTICS, TEXTS, byte_model, byte_tokenizer
from builders import pico
from peft_moe_delta import ExpertPlan, MoeDeltaConfig
from peft_moe_delta.allocation import LanguageGroups, LanguageStatistics
from peft_moe_delta.cli import main


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with a model and text of three languages."""
    byte_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for code, texts in TEXTS.items():
        (tmp_path / f"{code}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.fixture
def statistics(tmp_path: Path) -> str:
    """A file of statistics."""
    STATISTICS.save(tmp_path / "statistics.json")
    return str(tmp_path / "statistics.json")


def refused(capsys, *arguments: str) -> str:
    """The message with which a command line ends."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return str(stopped.value)


def test_from_text_to_a_model(inputs, capsys):
    text = {code: str(inputs / f"{code}.jsonl") for code in TEXTS}
    config = {"model": str(inputs / "model"), "text": text, "tokens": 60, "sequence_length": 20, "steps": 9}
    (inputs / "measure.yaml").write_text(yaml.safe_dump({**config, "learning_rate": "1e-3"}, sort_keys=False))
    files = [str(inputs / name) for name in ("statistics.json", "groups.json", "plan.json")]
    pictures = [f"{file}.png" for file in files]
    measure = ["measure", "--config", str(inputs / "measure.yaml"), "--output", files[0]]
    main([*measure, "--sources", "similarity"])
    main([*measure, "--sources", "deviation", "--steps", "2", "--merge", files[0], "--picture", pictures[0]])
    measured = LanguageStatistics.load(files[0])
    assert measured.settings["deviation"]["steps"] == 2 and measured.settings["deviation"]["learning_rate"] == 1e-3
    assert measured.settings["text"] == text and "command" in measured.settings["made"]

    flags = ["--original", "en", "--num-groups", "2", "--output", files[1], "--picture", pictures[1]]
    main(["group", "--statistics", files[0], "--source", "similarity", *flags])
    assert LanguageGroups.load(files[1]).as_languages() == {"en": "original", "hu": "expanded_1", "el": "expanded_2"}

    flags = ["--groups", files[1], "--budget", "5", "--output", files[2], "--picture", pictures[2]]
    main(["allocate", "--statistics", files[0], *flags])
    plan = ExpertPlan.from_json(Path(files[2]).read_text())
    assert plan.groups == ("original", "expanded_1", "expanded_2")
    assert sum(plan.num_experts(layer) - 1 for layer in plan.layers) == 5
    printed = capsys.readouterr().out
    assert (
        "| layer | similarity |" in printed and "| expanded_1 | hu |" in printed and "trainable parameters" in printed
    )
    assert all(Path(picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    model = get_peft_model(pico(), MoeDeltaConfig(languages=LanguageGroups.load(files[1]).as_languages(), experts=plan))
    assert model.base_model.plan().num_params(plan.expert_params, plan.hidden_size) == plan.num_params()


def test_plain_tables_are_read(tmp_path, capsys):
    (tmp_path / "layers.json").write_text("[0.1, 0.2, 0.4]")
    (tmp_path / "matrix.json").write_text(json.dumps({"hu": {"hu": 1, "el": 0.5}, "el": {"hu": 0.5, "el": 1}}))
    plan, groups = str(tmp_path / "plan.json"), str(tmp_path / "groups.json")
    main(["allocate", "--statistics", str(tmp_path / "layers.json"), "--budget", "7", "--output", plan])
    assert ExpertPlan.from_json(Path(plan).read_text()).counts == ((1, 4), (1, 2), (1, 1))
    main(["group", "--statistics", str(tmp_path / "matrix.json"), "--sizes", "1", "2", "--output", groups])
    assert LanguageGroups.load(groups).groups == (("hu", "el"),)


def test_languages_may_be_typed(statistics, tmp_path):
    plan = str(tmp_path / "plan.json")
    languages = ["--language", "en=original", "--language", "hu=new", "--language", "el=new"]
    main(["allocate", "--statistics", statistics, "--budget", "13", *languages, "--output", plan])
    assert ExpertPlan.from_json(Path(plan).read_text()).counts == ((1, 9), (1, 4))


def test_what_is_wrong_is_said(inputs, statistics, capsys):
    output = ["--output", str(inputs / "out.json")]
    model = ["measure", "--model", str(inputs / "model"), *output]
    assert "model is missing" in refused(capsys, "measure", *output)
    assert "two languages or more" in refused(capsys, *model, "--text", f"en={inputs / 'en.jsonl'}")
    text = [f"--text={code}={inputs / code}.jsonl" for code in TEXTS]
    assert "en: got text of" in refused(capsys, *model, *text)
    assert "text takes NAME=VALUE" in refused(capsys, *model, "--text", "en.jsonl")
    assert "Say how to group" in refused(capsys, "group", "--statistics", statistics, *output)
    assert "No file" in refused(capsys, "group", "--statistics", "nothing.json", *output)
    assert "needs a budget" in refused(capsys, "allocate", "--statistics", statistics, *output)
    both = ["--groups", "groups.json", "--language", "hu=new"]
    assert "not both" in refused(capsys, "allocate", "--statistics", statistics, *both, *output)
    (inputs / "no.json").write_text("{")
    assert "is not JSON" in refused(capsys, "allocate", "--statistics", str(inputs / "no.json"), *output)
    assert not (inputs / "out.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("budgets: 5", "unknown fields \\['budgets'\\]"),
        ("budget: many", "budget must be int"),
        ("strategy: best", "strategy: got \\['best'\\]"),
        ("language: hu", "language takes NAME=VALUE"),
        ("- budget", "must hold fields"),
        ("budget: [", "is not YAML"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config, message, statistics, tmp_path):
    (tmp_path / "config.yaml").write_text(config)
    flags = ["--config", str(tmp_path / "config.yaml"), "--statistics", statistics, "--output", "plan.json"]
    with pytest.raises(SystemExit, match=message):
        main(["allocate", *flags])
