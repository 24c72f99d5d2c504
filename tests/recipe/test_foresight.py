"""`--dry-run` and `status`: what stands in a run's way is found in seconds, and what the run would do is said."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, Trainer

from builders import perturbed
from peft_moe_delta.cli import main
from peft_moe_delta.kinds import size_text
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.data import Hashes
from peft_moe_delta.recipe.reader import laid_over, read_change
from peft_moe_delta.recipe.run import Run
from recipe.pico_recipe import pico_recipe, pico_tokenizer, write_lines

ENGLISH = "It was a bright cold day in April, and the clocks were striking thirteen."
EXPERTS = "adapter.experts={hu_group: 1, el_group: 1}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe that runs, which brings its post-trained model; and a folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("foresight")
    fields = pico_recipe(folder)
    post_trained = folder / "post_trained"
    perturbed(AutoModelForCausalLM.from_pretrained(fields["model"]), scale=0.05).save_pretrained(post_trained)
    pico_tokenizer().save_pretrained(post_trained)
    for name in ("tune", "dense", "quick"):
        del fields[name]
    fields |= {"post_trained": str(post_trained), "unseen": {"de": fields["languages"]["en"]["test"]}}
    wrong = folder / "wrong"
    write_lines(wrong / "body.jsonl", [{"body": "x", "id": 1}])
    write_lines(wrong / "number.jsonl", [{"text": "good"}, {"text": 3}])
    write_lines(wrong / "short.jsonl", [{"text": "too short"}])
    write_lines(wrong / "tasks.jsonl", [{"question": "1+1", "answer": "2"}])
    write_lines(wrong / "english.jsonl", [{"text": ENGLISH}] * 30)
    write_lines(wrong / "shared.jsonl", [{"text": ENGLISH, "language": "en"}] * 30)
    (wrong / "empty.txt").write_text("")
    (wrong / "folder").mkdir()
    (wrong / "taken" / "expanded").mkdir(parents=True)
    (wrong / "taken" / "expanded" / "mine.txt").write_text("mine")
    (wrong / "cut").mkdir()
    for file in Path(fields["model"]).iterdir():
        content = file.read_bytes()
        (wrong / "cut" / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    config = json.loads((Path(fields["model"]) / "config.json").read_text()) | {"vocab_size": 10**9}
    (wrong / "weightless").mkdir()
    (wrong / "weightless" / "config.json").write_text(json.dumps(config))
    pico_tokenizer().save_pretrained(wrong / "weightless")
    endless = pico_tokenizer()
    endless.eos_token = None
    for file in Path(fields["model"]).iterdir():
        (wrong / "endless").mkdir(exist_ok=True)
        (wrong / "endless" / file.name).write_bytes(file.read_bytes())
    endless.save_pretrained(wrong / "endless")
    return fields, wrong


def dry_run(made, tmp_path, *changes: str, command: str = "run") -> None:
    fields, wrong = made
    fields = copy.deepcopy(fields) | {"output": str(tmp_path / "run")}
    for change in changes:
        fields = laid_over(fields, read_change(change.replace("WRONG", str(wrong))))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    main([command, str(recipe), "--dry-run"])


FAULTS = [
    # what a recipe says
    ("expand.step=3", r"expand: unknown fields \['step'\]\. Did you mean steps\?"),
    ("expand.steps=0", "expand: steps must be a whole number of at least 1"),
    ("languages.hu.train={path: a.csv, colum: b}", r"languages\.hu\.?.*train.*Did you mean column"),
    ("post_trained=", "either `post_trained`.*or `tune`"),
    # text
    ("languages.hu.train=nowhere.jsonl", r"languages\.hu\.train: No file nowhere\.jsonl\. Check the path"),
    ("languages.el.test=WRONG/*.gz", r"languages\.el\.test: No file of text in .*Expected files that end in"),
    ("languages.en.train=WRONG/folder", r"languages\.en\.train: No file of text"),
    ("languages.hu.validation=WRONG/empty.txt", r"languages\.hu\.validation: .*empty\.txt is empty"),
    ("languages.hu.train=WRONG/body.jsonl", r"languages\.hu\.train: .*line 1.*the columns body, id\. Name.*`column`"),
    ("languages.hu.test=WRONG/number.jsonl", r"languages\.hu\.test: .*number\.jsonl, line 2: expected text"),
    ("languages.hu.train=WRONG/shared.jsonl", r"languages\.hu\.train: .*no row in 'hu'.*has 'en' \(30\)"),
    ("languages.hu.train=WRONG/short.jsonl", r"languages\.hu\.train: .*has 10 tokens.*Bring more text, or lower"),
    ("expand.steps=90000", r"languages\.el\.train: .*expand needs 2,880,000 of each"),
    ("unseen.fr=WRONG/empty.txt", r"unseen\.fr: .*is empty"),
    ("unseen.hun=WRONG/english.jsonl", "unseen: hun is among the languages.*Remove it"),
    # tasks
    ("tasks.saying.test=WRONG/tasks.jsonl", r"tasks\.saying\.test: .*columns question, answer.*`prompt`"),
    ("tasks.saying.language=klingonese", r"tasks\.saying\.language: 'klingonese' is no code"),
    # models
    ("model=WRONG/nowhere", "Cannot load a config of a model from"),
    ("model=WRONG/cut", r"model: .*model\.safetensors"),
    ("model=WRONG/endless", "model: its tokenizer has no end token"),
    ("post_trained=WRONG/cut", r"post_trained: .*model\.safetensors"),
    ("post_trained=WRONG/folder", "Cannot load a config of a model from"),
    ("num_hidden_layers=1", "post_trained: its num_hidden_layers is 2"),
    ("num_hidden_layers=7", "num_hidden_layers is 7, but .* has 2 layers"),
    # experts, routing, and what can be shipped
    ("languages.hu.group=nobody", "`experts` names the groups"),
    ("adapter.routing=lerned", "Unknown routing 'lerned'"),
    ("expand.sequence_length=4096", "expand: sequence_length is 4096, and .* has 1024 positions"),
    ("review=", "graft: after training, routing is 'language'.*graft: {language"),
    ("review.language_prior_groups=[orignal]", "names .'orignal'.; the groups are"),
    ("adapter.experts.hu_group=[2, 1]", r"graft: .*\[4, 3\].*remote_code: true"),
    ("graft.language=hu", "every language uses all experts"),
    ("graft.serve_with=vlm", "serve_with='vlm' is no engine"),
    ("graft.expert_scale={hungarian: 0.5}", "graft: expert_scale must be.*over hu_group, el_group"),
    # the machine, and the world
    ("model=WRONG/weightless", r"model: .*holds neither .*expand: its training takes .* GB .*Lower expand\.batch_size"),
    ("output=WRONG/empty.txt/run", r"output: .*empty\.txt is no folder"),
    ("output=WRONG/taken", "expanded has no step.json.*Move it away, or choose another `output`"),
    ("push=a/b/c", "push: .*Write OWNER/NAME"),
    ("push=me/model", "push: nobody is logged in.*hf auth login"),
    ("card.licence=nothing-1.0", "card: .*licence"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["post_trained=", "tune={tasks: none.jsonl, steps: 2, batch_size: 2, learning_rate: 1.0e-3}"],
            "tune: its training takes .*It trains all weights of the model: give `post_trained` instead of `tune`",
        ),
        (
            ["dense={steps: 2, batch_size: 2, sequence_length: 16, learning_rate: 1.0e-3}"],
            "dense: its training takes .*It trains all weights of the model: leave `dense` out",
        ),
        ([], "expand: its training takes .*Lower expand.batch_size .*set adapter.expert_rank"),
    ],
)
def test_what_to_do_without_memory_depends_on_what_takes_it(made, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("peft_moe_delta.recipe.foresight.memory_here", lambda: 1000)
    with pytest.raises(SystemExit, match=message):
        dry_run(made, tmp_path, *changes)


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[change for change, _ in FAULTS])
def test_a_dry_run_finds_what_stands_in_the_way(made, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(Trainer, "train", lambda *arguments: pytest.fail("trained in a dry run"))
    monkeypatch.setattr("peft_moe_delta.recipe.foresight.get_token", lambda: None)
    with pytest.raises(SystemExit, match=message) as refused:
        dry_run(made, tmp_path, change)
    assert str(refused.value).startswith("error: ") and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_all_faults_are_said_at_once(made, tmp_path):
    changes = ("languages.hu.train=a.csv", "languages.el.test=b.csv", "graft.architecture=mixtrl")
    with pytest.raises(SystemExit, match=r"3 faults .*\(1\) languages.hu.train.*\(2\) languages.el.test.*\(3\) graft"):
        dry_run(made, tmp_path, *changes)
    with pytest.raises(SystemExit, match=r"error: languages.hu.train"):
        dry_run(made, tmp_path, *changes, command="train")


def test_a_dry_run_says_what_would_be_done_and_does_nothing(made, tmp_path, capsys):
    dry_run(made, tmp_path, "languages.hu.test=WRONG/english.jsonl", "graft.by_context=true")
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.split("\n\n")[0].splitlines()[1:]]
    assert names == [
        "base", "post_trained", "expanded", "reviewed", "identified", "grafted", "by_context", "scores/base",
        "scores/post_trained", "scores/grafted", "scores/by_context", "drift",
    ]  # fmt: skip
    assert printed.count("runs for the first time") == len(names)
    assert "expanded             128 tokens  runs" in printed
    assert f"The result: mixtral, in {tmp_path}/run/grafted." in printed and "run/by_context" in printed
    assert re.search(r"takes about [\d.]+ [kM]B of memory; there are .*B\.\n", printed) and "B are free." in printed
    assert "Doubtful: languages.hu.test: " in printed and "look like 'en'. Check the file" in printed
    assert printed.endswith("Nothing was run.\n") and not (tmp_path / "run").exists()
    dry_run(made, tmp_path, command="train")
    assert "grafted" not in capsys.readouterr().out


def test_sizes_have_a_unit_that_fits():
    sizes = (0, 1_234, 2_500_000, 999_000_000, 80e9, 1_234e9)
    said = ["0.0 kB", "1.2 kB", "2.5 MB", "999.0 MB", "80.0 GB", "1,234.0 GB"]
    assert [size_text(size) for size in sizes] == said


def test_a_dry_run_times_the_expansion_when_asked(made, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made[0] | {"output": str(tmp_path / "run")}), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # those of other libraries are not a user's business
        main(["run", str(path), "--dry-run", "--time"])
    printed = capsys.readouterr().out
    assert "Nothing was run." in printed and "so its 2 take about" in printed
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--time belongs to --dry-run"):
        main(["train", str(path), "--time"])


def test_what_is_kept_and_why_the_rest_runs_again(made, tmp_path, capsys, monkeypatch):
    fields: dict[str, Any] = copy.deepcopy(made[0]) | {"output": str(tmp_path / "run")}
    fields["languages"]["el"]["train"] = shutil.copy(fields["languages"]["el"]["train"], str(tmp_path / "el.jsonl"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
    run = Run(read_recipe(recipe))
    run.expanded()
    monkeypatch.setattr(Trainer, "train", lambda *arguments: pytest.fail("trained by looking"))

    def states(*words: str) -> dict[str, list[str]]:
        main([*words, str(recipe)])
        lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
        return {line.split()[0]: re.split("  +", line)[1:] for line in lines}

    seen = states("status")
    assert seen["expanded"][0] == "just now" and seen["expanded"][-1] == seen["base"][-1] == "kept"
    assert seen["reviewed"][-1] == "runs for the first time"
    assert states("run", "--dry-run")["expanded"][-1] == "kept"
    with Path(fields["languages"]["el"]["train"]).open("a") as file:
        file.write('{"text": "new"}\n')
    changed = "runs again, since the content of languages.el.train has changed (needs --overwrite)"
    assert states("status")["expanded"][-1] == changed
    assert "runs again" in states("status", "--set", "expand.steps=1")["expanded"][-1]


def test_a_recipe_that_only_trains_has_a_status(made, tmp_path, capsys):
    fields = {name: value for name, value in made[0].items() if name != "review"} | {"output": str(tmp_path / "run")}
    recipe = tmp_path / "recipe.yaml"

    def status() -> tuple[list[str], str]:
        recipe.write_text(yaml.safe_dump(fields, allow_unicode=True, sort_keys=False), encoding="utf-8")
        main(["status", str(recipe)])
        rows, why = capsys.readouterr().out.split("\n\n")
        return [" ".join(row.split()) for row in rows.splitlines()[1:]], why

    waiting = [f"{name} runs for the first time" for name in ("base", "post_trained", "expanded")]
    rows, why = status()
    assert rows == waiting and why.startswith(
        "`run` would not get further: graft: after training, routing is 'language'"
    )
    Run(read_recipe(str(recipe))).base()
    fields["post_trained"] = str(tmp_path / "nowhere")
    rows, why = status()
    assert rows[0].endswith("kept") and rows[1:] == waiting[2:] and "nowhere" in why


def test_hashes_of_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    file, memory = tmp_path / "model", tmp_path / "hashes.json"
    file.write_text("one")
    first = Hashes(memory, large=1)(file)
    monkeypatch.setattr("peft_moe_delta.recipe.data.file_hash", lambda path: "hashed")
    assert Hashes(memory, large=1)(file) == first and Hashes(memory, large=10)(file) == "hashed"
    file.write_text("other")
    assert Hashes(memory, large=1, saves=False)(file) == "hashed"
    assert first in memory.read_text(), "only read"
    memory.write_text("[]")
    assert Hashes(memory, large=1)(file) == "hashed" and "hashed" in memory.read_text()
