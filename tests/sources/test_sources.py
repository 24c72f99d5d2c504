"""Text and tasks in whatever form people keep them: the same documents come out; what is wrong is said, and where."""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import lzma
import shutil
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import quickstart
from peft_moe_delta.errors import DataError, PeftMoeDeltaError, RecipeError
from peft_moe_delta.recipe.data import content_of, shuffled
from peft_moe_delta.sources import TaskSource, TextSource, each_text, read_tasks, read_texts, source_of

LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for the end of a line, beside the line feed."""


def test_characters_that_end_lines_elsewhere_stay_in_their_text(tmp_path):
    file = tmp_path / "text.jsonl"
    texts = [f"one{LINE_ENDS}two", "\ufeffthree", "four\r\n\r"]
    file.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8-sig")
    assert read_texts(file) == texts
    plain = tmp_path / "plain.jsonl"
    plain.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-8")
    assert quickstart.read(plain, "text") == texts


def test_documents_are_whole_up_to_a_number_of_bytes(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "ένα"}\n\n{"text": "δύο"}\n{"text": "τρία"}\n', encoding="utf-8")
    assert read_texts(file) == ["ένα", "δύο", "τρία"]
    assert [len(read_texts(file, limit)) for limit in (1, 6, 7, 12, 13)] == [1, 1, 2, 2, 3]
    assert [len(read_texts(file, documents=number)) for number in (1, 2, 9)] == [1, 2, 3]


WHOLE = b'{"text": "a", "prompt": "a", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (WHOLE + b'{"text": ', r"line 2: expected a JSON object"),
        (WHOLE + b'["a"]', r"line 2: expected an object; got list"),
        (
            WHOLE + b'{"txt": "a", "prompt": "a"}',
            r"line 2: expected (a `text`, and the row has the columns txt|`prompt` and)",
        ),
        (b'{"text": 1, "prompt": 1, "answer": 2}', r"line 1: expected text in `(text|prompt)`; got int \(1\)"),
        (b'{"text": "\\ud800", "prompt": "\\ud800", "answer": "a"}', "line 1: holds half of a surrogate pair"),
        (b'{"text": "\xff"}', "no jsonl file in UTF-8"),
        (b"[" * 100_000, "line 1: expected a JSON object"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: expected a JSON object"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(tmp_path, content, message):
    file = tmp_path / "text.jsonl"
    file.write_bytes(content)
    for read in (read_texts, read_tasks):
        with pytest.raises(DataError, match=message) as refusal:
            read(file)
        str(refusal.value).encode()  # can be printed


TEXTS = ["one\u2028two", "NA", "2026-01-01", 'he said "no", then\nleft; 3']
"""What readers that guess types make something else of."""


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *([n, t] for n, t in enumerate(TEXTS))])


def write_forms(folder: Path) -> None:
    """The texts in every form."""
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    forms = {
        "a.jsonl": lines,
        "a.ndjson": b"\xef\xbb\xbf" + lines,
        "a.json": lines,
        "b.json": b"\n" + json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.bz2": bz2.compress(lines),
        "a.jsonl.xz": lzma.compress(lines),
        "A.JSON.ZST": pyarrow.compress(lines, codec="zstd", asbytes=True),
    }
    for name, content in forms.items():
        (folder / name).write_bytes(content)
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("a.tsv", "\t")):
        write_csv(folder / name, delimiter)
    columns = {"text": TEXTS, "id": list(range(len(TEXTS)))}
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=2)


def test_every_form_gives_the_same_documents(tmp_path):
    write_forms(tmp_path / "forms")
    (tmp_path / "forms" / "README.md").write_text("no text")
    (tmp_path / "forms" / ".hidden.txt").write_text("no text")
    files = [file for file in sorted((tmp_path / "forms").iterdir()) if not file.match("README.md")]
    assert [read_texts(file) for file in files if file.name != ".hidden.txt"] == [TEXTS] * 12
    assert read_texts(tmp_path / "forms") == TEXTS * 12
    assert read_texts(f"{tmp_path}/*/a.jsonl*") == TEXTS * 4
    assert read_texts(TextSource(path=[f"{tmp_path}/forms/a.csv", f"{tmp_path}/forms/a.json"], limit=5)) == [
        *TEXTS,
        TEXTS[0],
    ]


def test_paragraphs_are_documents_and_lines_where_there_are_none(tmp_path):
    (tmp_path / "paragraphs.txt").write_bytes("\nέ one\r\ntwo\r\n \n\nthree\n".encode())
    assert read_texts(tmp_path / "paragraphs.txt") == ["έ one\ntwo", "three"]
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n\n")
    assert read_texts(tmp_path / "lines.txt") == ["one\ntwo\nthree"], "a blank line at the end is one"
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    assert read_texts(tmp_path / "lines.txt") == ["one", "two", "three"]
    (tmp_path / "long.txt").write_text("line\n" * 300_000 + "\nlast\n")
    assert read_texts(tmp_path / "long.txt", documents=2) == ["line", "line"], "not all is read to find a blank line"


def test_columns_are_named_and_several_languages_share_a_file(tmp_path):
    file = tmp_path / "all.csv"
    file.write_text("body,language,code\nszia,hun_Latn,x\nhello,en,x\nvilág,hu,x\n,hu,x\n", encoding="utf-8")
    for source in (f"{file}#column=body", TextSource(path=str(file), column="body")):
        assert read_texts(source, language="hu") == ["szia", "világ"], "an empty row is none"
        assert read_texts(source, language="en") == ["hello"]
        assert read_texts(source) == ["szia", "hello", "világ"]
    assert read_texts(f"{file}#column=body,limit=1", language="en") == ["hello"], "of its own rows"
    assert read_texts(f"{file}#column=body,language_column=", language="hu") == ["szia", "hello", "világ"]
    with pytest.raises(DataError, match=r"row 1: expected a `text`, and the row has the columns body, language, code"):
        read_texts(file)
    with pytest.raises(
        DataError, match=r"no row in 'el': its column `language` has 'hu' \(2\), 'hun_Latn' \(1\), 'en'"
    ):
        read_texts(f"{file}#column=body", language="el")
    with pytest.raises(RecipeError, match="Did you mean column"):
        read_texts(f"{file}#colum=body")
    odd = tmp_path / "a#column=b.txt"
    odd.write_text("odd")
    assert read_texts(odd) == ["odd"]


def test_tasks_have_columns_too(tmp_path):
    (tmp_path / "tasks.tsv").write_text("question\tanswer\n1+1=\t2\n2+2=\t4\n")
    assert read_tasks(f"{tmp_path}/tasks.tsv#prompt=question", 1) == [{"prompt": "1+1=", "answer": "2"}]
    with pytest.raises(DataError, match="expected `prompt` and `answer`, and the row has the columns question, answer"):
        read_tasks(tmp_path / "tasks.tsv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.csv", b"text\n\"\"\n", "has no text: every row is empty"),
        ("a.csv", b"text\na,b\n", "row 1: more fields than the header"),
        ("a.csv", b'text\n"a', r"is no csv file in UTF-8: unexpected end of data"),
        ("a.json", b'[{"text": 1}]', r"a\.json, row 1: expected text in `text`; got int \(1\)"),
        ("a.json", b"[1]", "row 1: expected an object; got int"),
        ("a.json", b'[{"text"', "expected a list of JSON objects"),
        ("a.jsonl.gz", b"not zipped", r"is no jsonl\.gz file in UTF-8"),
        ("a.jsonl.xz", b"not zipped", r"is no jsonl\.xz file"),
        ("a.jsonl.zst", b"not zipped", r"is no jsonl\.zst file"),
        ("a.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:-9], r"is no txt\.gz file"),
        ("a.parquet", b"no columns", "is no parquet file"),
        ("a.pdf", b"no text", r"expected a file that ends in \.jsonl"),
        ("a.parquet.gz", b"", r"expected a file that ends in"),
        ("a.jsonl", b'{"text": "a", "language": "hu"}\n{"text": "b"}', "line 2: has no `language`, and rows before"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        read_texts(tmp_path / name, language="hu")
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_places_without_text_are_said(tmp_path):
    for path in (tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(DataError, match="No file of text in .*Expected files that end in"):
            read_texts(path)
    for path in (tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="No file"):
            read_texts(path)


def test_no_more_is_read_than_is_asked_for(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' * 3 + "broken\n")
    assert list(itertools.islice(each_text(file), 3)) == ["good"] * 3
    assert read_texts(TextSource(path=str(file), limit=3)) == read_texts(file, 12) == ["good"] * 3
    drawn = shuffled(str(file), "hu", seed=0, pool_bytes=8)
    assert [next(drawn), next(drawn)] == ["good"] * 2
    with pytest.raises(DataError, match="line 4"):
        list(drawn)


def test_pools_are_shuffled_and_nothing_is_lost(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n:03}\n" for n in range(100)))
    whole, pooled = (list(shuffled(f"{tmp_path}/a.txt", "hu", 0, size)) for size in (10**6, 30))
    assert sorted(whole) == sorted(pooled) == read_texts(tmp_path / "a.txt")
    assert whole != sorted(whole) and {text[:2] for text in pooled[:10]} == {"00"}


def test_a_data_set_on_the_hub_is_streamed(tmp_path, monkeypatch):
    """From a folder, as the Hub keeps it; only where it lies is not the Hub."""
    write_forms(tmp_path / "forms")
    for config in ("hu", "en"):
        (tmp_path / "set" / config).mkdir(parents=True)
        shutil.copy(tmp_path / "forms/a.parquet", tmp_path / "set" / config / "train.parquet")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- {{config_name: {c}, data_files: {c}/*.parquet}}\n" for c in ("hu", "en"))
        + "---\n"
    )
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: load(str(tmp_path / name), *a, **k))
    assert read_texts("hf://set#config=hu", language="hu") == TEXTS
    assert read_texts(TextSource(path="hf://datasets/set", config="en", limit=2)) == TEXTS[:2]
    for source, message in (
        ("hf://set", "config"), ("hf://set#config=de", "'de'"), ("hf://set#config=hu,split=test", "split 'test'"),
        ("hf://set#config=hu,column=body", "row 1: expected a `body`, and the row has the columns text, id"),
        ("hf://nothing/here", "Cannot read the data set hf://nothing/here"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message) as refused:
            read_texts(source)
        assert "\n" not in str(refused.value)


def test_what_stands_for_a_source_is_its_content_and_how_it_is_read(tmp_path):
    write_forms(tmp_path / "forms")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "forms/a.csv", tmp_path / folder / f"{folder}.csv")
        shutil.copy(tmp_path / "forms/b.json", tmp_path / folder / "b.json")
    one, two = (content_of(f"{tmp_path}/{folder}/{folder}.csv") for folder in ("one", "two"))
    assert isinstance(one, str) and one == two, "under any name"
    assert content_of(f"{tmp_path}/one/one.csv#column=id") == {"column": "id", "files": {"file": one}}
    both = content_of(f"{tmp_path}/one")
    assert both == {"files": {"b.json": content_of(f"{tmp_path}/one/b.json"), "one.csv": one}}
    assert content_of(source_of(f"{tmp_path}/one/one.csv#prompt=id", TaskSource), TaskSource)["prompt"] == "id"
    with pytest.raises(PeftMoeDeltaError, match="No file"):
        content_of("nowhere.csv")
