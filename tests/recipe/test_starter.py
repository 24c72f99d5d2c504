"""`init` writes a recipe that a dry run accepts, on files as people have them."""

from __future__ import annotations

import pytest

from builders import pico
from peft_moe_delta.cli import main
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.sources import read_texts
from recipe.pico_recipe import SENTENCES, pico_tokenizer, write_lines


@pytest.mark.parametrize(("kind", "form"), [("llama", "mixtral"), ("gpt2", "remote code")])
def test_what_init_writes_passes_a_dry_run(tmp_path, capsys, kind, form):
    tokenizer = pico_tokenizer()
    pico(kind, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "hu.txt").write_text("".join(f"{SENTENCES['hu']} {n}\n" for n in range(100)))
    write_lines(tmp_path / "en.jsonl", [{"body": f"{SENTENCES['en']} {n}"} for n in range(60)])
    given = ["--model", str(tmp_path / "model"), "--language", f"hu={tmp_path}/hu.txt"]
    main(["init", *given, "--original", f"en={tmp_path}/en.jsonl#column=body"])
    path = tmp_path / "recipe.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    recipe = read_recipe(path)
    assert recipe.post_trained == recipe.model and "# the base itself" in path.read_text()
    hungarian = recipe.languages["hu"]
    parts = [read_texts(source) for source in (hungarian.train, hungarian.validation, hungarian.test)]
    assert [len(part) for part in parts] == [80, 10, 10] and len(set().union(*parts)) == 100
    assert recipe.expand.steps * recipe.expand.batch_size * recipe.expand.sequence_length > 1000, "of 3,600 tokens"
    main(["run", str(path), "--dry-run", "--set", f"output={tmp_path}/run"])
    assert f"The result: {form}" in capsys.readouterr().out


def test_what_cannot_start_is_said(tmp_path):
    tokenizer = pico_tokenizer()
    pico(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "hu.txt").write_text("a\nb\nc\n")
    model = ["init", "--model", str(tmp_path / "model")]
    for given, message in (
        ([f"--language=hu={tmp_path}/hu.txt"], "A language has 2 tokens to train on, too few.*Bring more text"),
        (["--language=hu=nowhere.txt"], r"No file nowhere\.txt"),
        (["--language=hu=a.txt", "--original=hu=a.txt"], "hu: given as --language and as --original"),
        (["--language=hu"], "--language takes NAME=VALUE"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            main([*model, *given])
