"""`peft-moe-delta mix`, from folders to an adapter that loads."""

from __future__ import annotations

import json
import re

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import logits, token_batch
from mixing.branches import write_branches
from peft_moe_delta import RouterStatistics
from peft_moe_delta.cli import main
from training.common import make_tokenizer


def arguments(folder):
    checkpoints = write_branches(folder)
    for path in checkpoints.values():
        make_tokenizer().save_pretrained(path)
    branches = [f"--branch={name}={path}" for name, path in checkpoints.items() if name != "seed"]
    return ["mix", str(checkpoints["seed"]), *branches, "--output", str(folder / "adapter")]


def test_the_command_mixes_averages_and_fits_routers(tmp_path, capsys):
    text = []
    for number, code in enumerate(("en", "hu", "az")):
        lines = [json.dumps({"text": f"w{3 + 30 * number + i} w{4 + 30 * number}"}) + "\n" for i in range(9)]
        (tmp_path / f"{code}.jsonl").write_text("".join(lines), encoding="utf-8")
        text.append(f"--text={code}={tmp_path / code}.jsonl")
    languages = ["--language=en=original", "--language=hu=uralic", "--language=az=turkic"]
    others = ["--others=original=1,uralic=2", "--base-output", str(tmp_path / "base")]
    main([*arguments(tmp_path), *languages, *others, *text, "--top-k=1"])
    assert capsys.readouterr().out.splitlines() == [f"adapter: {tmp_path}/adapter", f"its base: {tmp_path}/base"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), token_batch()).isfinite().all()
    statistics = RouterStatistics.load(tmp_path / "adapter" / "router_statistics.safetensors")
    assert statistics.languages == ["en", "hu", "az"]


def test_a_dry_run_says_what_would_be_mixed_and_mixes_nothing(tmp_path, capsys):
    given = arguments(tmp_path)
    (tmp_path / "az.jsonl").write_text('{"text": "w70 w71"}\n', encoding="utf-8")
    languages = ["--language=en=original", "--language=hu=uralic", "--language=az=turkic"]
    main([*given, *languages, f"--text=az={tmp_path / 'az.jsonl'}", "--dry-run"])
    printed = capsys.readouterr().out
    assert re.search(r"^uralic +\S+/uralic +hu$", printed, re.MULTILINE) and "Routers: fitted on az." in printed
    assert printed.endswith("Nothing was run.\n") and not (tmp_path / "adapter").exists()
    for wrong, message in (
        ([f"--text=az={tmp_path / 'nowhere.txt'}"], "No file"),
        (["--routing=by_mood"], "by_mood"),
        (["--top-k=9"], "top_k=9"),
        ([f"--branch=other={tmp_path / 'nothing'}"], "nothing"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*given, *wrong, "--dry-run"])


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--language=hu"], "--language takes NAME=VALUE"), (["--others=average"], "base_output.*goes together")],
)
def test_bad_arguments_end_with_one_message_and_no_folder(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        main([*arguments(tmp_path), *more])
    assert not (tmp_path / "adapter").exists()
