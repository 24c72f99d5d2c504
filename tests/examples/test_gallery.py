"""The examples of docs/examples.md on pico models: each runs from its command line to its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import greek
import new_tokens
import peft_moe_delta
import streaming
from builders import pico
from recipe.pico_recipe import SENTENCES, pico_model, pico_tokenizer, write_lines
from served.pico_export import TEMPLATE, WORDS, with_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:This training is doubtful:UserWarning"),  # few tokens, large steps
]


@pytest.fixture
def base(tmp_path) -> str:
    pico_model().save_pretrained(tmp_path / "base")
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def run(module, monkeypatch, folder: Path, *arguments: str) -> Path:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--output", str(folder / "out")])
    module.main()
    return folder / "out"


def text_of(folder: Path, code: str, number: int = 40) -> str:
    return write_lines(folder / f"{code}.jsonl", [{"text": f"{SENTENCES[code]} {n}", "id": n} for n in range(number)])


def test_streaming(base, tmp_path, monkeypatch):
    texts = [f"--text={code}={text_of(tmp_path, code)}" for code in ("hu", "el")]
    given = ["--model", base, *texts, "--size=hu=9", "--size=el=1", "--tokens=900", "--steps=2", "--max-length=32"]
    model, _ = peft_moe_delta.load(run(streaming, monkeypatch, tmp_path, *given))
    assert model.active_peft_config.languages == {"en": "original", "hu": "hu", "el": "el"}


@pytest.mark.slow
def test_streaming_on_two_processes(base, tmp_path):
    texts = [f"--text={code}={text_of(tmp_path, code)}" for code in ("hu", "el")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = ["--model", base, *texts, "--steps", "2", "--max-length", "32", "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(ROOT / "examples/streaming.py"), *given], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert peft_moe_delta.load(tmp_path / "out")[0].active_peft_config.languages["el"] == "el"


def test_new_tokens(tmp_path, monkeypatch, capsys):
    pico("qwen3", vocab_size=WORDS, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    texts = [
        write_lines(tmp_path / f"{code}.jsonl", [{"text": text} for text in lines])
        for code, lines in (("el", greek.GREEK), ("en", greek.ENGLISH))
    ]
    given = ["--model", str(tmp_path / "base"), "--text", texts[0], "--original-text", texts[1]]
    out = run(new_tokens, monkeypatch, tmp_path, *given, "--tokens=5", "--steps=2")
    before, after = map(float, re.search(r"word: (.*) before, (.*) with 5", capsys.readouterr().out).groups())
    model, tokenizer = peft_moe_delta.load(out)
    assert after < before and len(model.active_peft_config.record.new_tokens) == 5
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(out).get_vocab()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_chat_trl(base, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    import chat_trl

    rows = [
        {
            "prompt": [{"role": "user", "content": f"Mondd: {n}"}],
            "completion": [{"role": "assistant", "content": f"{n} {SENTENCES['hu']}"}],
        }
        for n in range(16)
    ]
    file = write_lines(tmp_path / "talk.jsonl", rows)
    out = run(chat_trl, monkeypatch, tmp_path, "--model", base, "--conversations", file, "--steps=2", "--rank=2")
    model, tokenizer = peft_moe_delta.load(out)
    assert model.active_peft_config.expert_rank == 2 and tokenizer.chat_template == TEMPLATE


def test_every_example_is_listed_and_says_what_it_costs():
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    helpers = {"demo_inputs.py", "demo_tasks.py", "demo_text.py"}
    files = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert {name for name in files - helpers if f"examples/{name}" not in page} == set()
    scripts = [ROOT / "examples" / name for name in files - helpers if name.endswith(".py")]
    assert [path.name for path in scripts if "Cost: " not in path.read_text(encoding="utf-8")] == []
