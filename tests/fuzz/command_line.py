"""Command lines that are nearly right: of every command, with a value, a file or an option that does not belong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from fuzz.runner import Case
from fuzz.values import TEXTS, damaged
from peft_moe_delta.cli import main


def good_lines(folder: Path) -> list[list[str]]:
    """One command line of every command that would go through."""
    new, text = folder / "new", [f"--text={code}={folder}/{code}.test.jsonl" for code in ("en", "hu")]
    text = [part for option in text for part in option.split("=", 1)]
    models = [str(folder / name) for name in ("model", "post", "adapter")]
    return [
        ["run", f"{folder}/recipe.yaml", "--quick"],
        ["train", f"{folder}/recipe.yaml", "--quick", "--set", "expand.steps=1", "--set", "seed=3"],
        ["measure", "--model", models[0], *text, "--tokens", "10", "--sequence-length", "8", "--steps", "1",
         "--sources", "similarity", "--batch-size", "2", "--seed", "1", "--vector-layers", "1", "--learning-rate",
         "1e-5", "--output", f"{new}/statistics.json"],
        ["group", "--statistics", f"{folder}/statistics.json", "--source", "deviation", "--original", "en",
         "--num-groups", "2", "--seed", "3", "--layers", "1", "--output", f"{new}/groups.json"],
        ["group", "--statistics", f"{folder}/statistics.json", "--sizes", "1", "2", "--output", f"{new}/groups.json"],
        ["allocate", "--statistics", f"{folder}/statistics.json", "--strategy", "uniform", "--groups",
         f"{folder}/groups.json", "--budget", "4", "--floor", "1", "--ceiling", "3", "--output", f"{new}/plan.json"],
        ["allocate", "--statistics", f"{folder}/statistics.json", "--strategy", "deviation_threshold", "--language",
         "en=original", "--language", "hu=hu_group", "--language", "el=el_group", "--threshold", "0.5",
         "--experts-per-group", "1", "--output", f"{new}/plan.json"],
        ["mix", models[0], "--branch", f"hu_group={models[1]}", "--branch", f"el_group={models[0]}", "--language",
         "en=original", "--language", "hu=hu_group", "--language", "el=el_group", "--others", "seed", "--top-k", "1",
         "--routing", "learned", *text, "--text", f"el={folder}/el.test.jsonl", "--output", f"{new}/mixed"],
        ["mix", models[0], "--branch", f"hu={models[1]}", "--others", "original=1,hu=2", "--base-output", f"{new}/base",
         "--output", f"{new}/mixed"],
        ["grow", f"{folder}/grow.yaml"],
        ["delta", "compute", models[0], models[1], "--rank", "2", "--dtype", "float32", "--output", f"{new}/delta"],
        ["delta", "inspect", f"{folder}/delta.safetensors", "--base", models[0], "--adapter", models[2]],
        ["delta", "combine", "--delta", f"{folder}/delta.safetensors=0.5", "--output", f"{new}/delta"],
        ["graft", *models, f"{new}/grafted", "--scale", "1", "--expert-scale", "0.5", "--expert-scale", "hu_group=1",
         "--target", "stock", "--shard-size", "20KB"],
        ["graft", *models, f"{new}/grafted", "--target", "remote_code", "--replicate-dense-layers"],
        ["verify", f"{folder}/grafted"],
        ["explain", models[2], "--post-trained", models[1]],
        ["evaluate", "--model", f"a={models[0]}", "--model", f"b={models[2]}", *text, "--group", "en=original",
         "--tasks", f"saying={folder}/tasks.jsonl", "--task-language", "saying=en", "--reference", "a", "--trained",
         "b=hu,en", "--agreement", "a=b", "--limit-bytes", "20", "--max-length", "16", "--batch-size", "2",
         "--max-new-tokens", "1", "--output", f"{new}/report"],
        ["harness-tasks", f"{folder}/recipe.yaml", f"{new}/tasks"],
        ["harness-results", f"{folder}/report", f"{folder}/results.json", "--model", "ours"],
        ["card", models[2], "--name", "x", "--parent", "org/base=mit", "--base-model", "org/base", "--licence", "mit",
         "--data", "d", "--limit", "l", "--output", f"{new}/card"],
        ["card", f"{folder}/grafted", "--adapter", models[2], "--report", f"{folder}/report", "--measured-as", "ours",
         "--post-trained", "org/chat", "--output", f"{new}/card"],
        ["push", models[2], "user/name", "--card", f"{new}/card", "--base-model", "org/base", "--revision", "main"],
    ]  # fmt: skip


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Endless command lines over the files of `workspace.make`."""
    random, number = Random(seed), 0
    (folder / "cwd").mkdir(exist_ok=True)
    while True:
        for line in good_lines(folder):
            number += 1
            given = list(line)
            for _ in range(random.choice([1, 1, 1, 2, 3])):
                given = _spoilt(random, given, folder, folder / "damaged" / str(number))
            if given[:2] in ([line[0], f"{folder}/recipe.yaml"],) and line[0] in ("run", "train"):
                given[1] = random.choice(_others(folder))  # a whole run takes too long here
            yield f"command line {given}", partial(_called, given, folder)


def _called(given: list[str], folder: Path) -> None:
    before = Path.cwd()
    os.chdir(folder / "cwd")
    try:
        main(given)
    finally:
        os.chdir(before)
        for place in ("new", "damaged", "cwd"):
            shutil.rmtree(folder / place, ignore_errors=True)
        (folder / "cwd").mkdir()


def _spoilt(random: Random, line: list[str], folder: Path, scratch: Path) -> list[str]:
    """A line with one thing wrong."""
    line = list(line)
    where = random.randrange(1, len(line)) if len(line) > 1 else 0
    paths = [i for i, part in enumerate(line) if str(folder) in part and f"{folder}/new" not in part]
    outputs = [i for i, part in enumerate(line) if f"{folder}/new" in part]
    job = random.randrange(10)
    if job == 0 and len(line) > 1:
        del line[where]
    elif job == 1:
        line.insert(where, random.choice(["--nothing", "--output", "--config", "--language", "-x", *TEXTS]))
    elif job == 2 and outputs:
        line[random.choice(outputs)] = random.choice(_taken(folder))
    elif job in (3, 4) and paths:
        index = random.choice(paths)
        name, equals, path = line[index].rpartition("=")
        line[index] = f"{name}{equals}{random.choice(_others(folder))}"
    elif job in (5, 6) and paths:
        index = random.choice(paths)
        name, equals, path = line[index].rpartition("=")
        line[index] = f"{name}{equals}{_damaged(random, Path(path), scratch)}"
    elif job == 7:
        line[where:where] = line[where : where + 2]  # given twice
    else:
        line[where] = random.choice(TEXTS)
    return line


def _taken(folder: Path) -> list[str]:
    """Where nothing can be written, or where something is."""
    return [str(folder / name) for name in ("kept", "kept.json", "kept.json/below", "model", "grafted")] + [
        "/proc/nothing/here", "/proc/nothing", "", ".", "\0", "x" * 300
    ]  # fmt: skip


def _others(folder: Path) -> list[str]:
    """Files and folders that are good for something else."""
    names = ["model", "post", "adapter", "grafted", "report", "kept", "kept.json", "statistics.json", "groups.json",
             "plan.json", "delta.safetensors", "grow.yaml", "results.json", "hu.test.jsonl", "tasks.jsonl", "nothing",
             "model/config.json", "adapter/adapter_model.safetensors"]  # fmt: skip
    return [str(folder / name) for name in names]


def _damaged(random: Random, path: Path, scratch: Path) -> str:
    """A damaged copy of a file, or a copy of a folder with one file damaged or missing."""
    if path.is_file():
        return damaged(random, path, scratch / path.name)
    if not path.is_dir():
        return str(path)
    copy = scratch / path.name
    if copy != path:
        shutil.copytree(path, copy, dirs_exist_ok=True)
    files = sorted(f for f in copy.rglob("*") if f.is_file())
    if not files:  # its last one is missing already
        return str(copy)
    file = random.choice(files)
    if random.random() < 0.2:
        file.unlink()
    else:
        damaged(random, file, file)
    return str(copy)
