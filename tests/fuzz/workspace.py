"""A folder with one good file or folder of every kind that the command line reads, all of them tiny."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml
from transformers import AutoModelForCausalLM

from builders import perturbed, upcycle
from evaluation.sample_report import sample_report
from peft_moe_delta.cli import main
from recipe.pico_recipe import pico_recipe, pico_tokenizer

OUTPUTS = {"measure": "statistics.json", "group": "groups.json", "allocate": "plan.json", "delta": "delta.safetensors"}


def make(folder: Path) -> Path:
    """Fill a folder; `kept/` in it is what outputs that exist already point at."""
    fields = pico_recipe(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    perturbed(base, scale=0.05).save_pretrained(folder / "post")
    pico_tokenizer().save_pretrained(folder / "post")
    languages = {"en": "original", "hu": "hu_group", "el": "el_group"}
    model = upcycle(base, trained=True, languages=languages, experts={"hu_group": 1, "el_group": 1})
    model.save_pretrained(folder / "adapter")
    languages = {
        code: {"group": group, "train": str(folder / f"{code}.train.jsonl")} for code, group in languages.items()
    }
    languages["fi"] = {"group": "fi_group", "train": str(folder / "hu.train.jsonl")}
    grow = {"adapter": str(folder / "adapter"), "output": str(folder / "new" / "grown"), "languages": languages}
    grow |= {"experts": {"fi_group": 1}, "model": str(folder / "model"), "precision": "fp32"}
    for name, data in {"recipe": fields, "grow": grow}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    sample_report().save(folder / "report")
    (folder / "results.json").write_text(json.dumps({"results": {"moe_delta_text_hu": {"bits_per_byte,none": 1.5}}}))
    pairs = [f"--text={code}={folder}/{code}.test.jsonl" for code in ("en", "hu", "el")]
    for line in (
        ["measure", "--model", f"{folder}/model", *pairs, "--tokens", "20", "--sequence-length", "16", "--steps", "1"],
        ["group", "--statistics", f"{folder}/statistics.json", "--original", "en", "--num-groups", "2"],
        [
            "allocate",
            "--strategy",
            "uniform",
            "--statistics",
            f"{folder}/statistics.json",
            "--groups",
            f"{folder}/groups.json",
            "--budget",
            "4",
        ],
        ["delta", "compute", f"{folder}/model", f"{folder}/post"],
        ["graft", f"{folder}/model", f"{folder}/post", f"{folder}/adapter", f"{folder}/grafted"],
    ):
        name = {
            "measure": "statistics.json",
            "group": "groups.json",
            "allocate": "plan.json",
            "delta": "delta.safetensors",
        }
        output = [] if line[0] == "graft" else ["--output", f"{folder}/{name[line[0]]}"]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            main([*line, *output])
    shutil.copytree(folder / "adapter", folder / "kept")
    (folder / "kept.json").write_text("{}")
    return folder
