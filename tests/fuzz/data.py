"""Data files as an enemy or a bad disk leaves them: for each kind a whole one, and what becomes of it.

`cases(seed)` gives `(label, call)` without end. A call writes one file into a folder of its own and reads it as the
package does; it returns, or raises. Right is an error of ours, or a value; and the file as it was.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from fuzz.runner import Case
from greek import make_tokenizer
from peft_moe_delta import ExpertPlan, group_languages
from peft_moe_delta.allocation import LanguageGroups
from peft_moe_delta.allocation.statistics import LanguageStatistics
from peft_moe_delta.checkpoint import CheckpointReader
from peft_moe_delta.evaluation.report import EvalReport
from peft_moe_delta.files import read_text
from peft_moe_delta.graft.stored import DeltaFile
from peft_moe_delta.hub import CardFacts, licence_of
from peft_moe_delta.loading import load_tokenizer
from peft_moe_delta.mixing import RouterStatistics
from peft_moe_delta.sources import read_tasks, read_texts

Read = Callable[[Path], Any]

TELLING = b'{}[]",:0123456789.-eE\\ \n\r\x00\xffAFBu'
"""Bytes that mean something in JSON or in a header."""
FOREIGN = (
    None, True, -1, 0, 1e400, 10**30, "", "x", "\ud800", "\u2028", [], [[]], {}, {"": None}, [None], {"a": {"b": []}},
)  # fmt: skip
"""Values that stand where another kind is expected."""


def lines(*objects: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)


def kinds() -> dict[str, tuple[str, bytes, Read]]:
    """Kind of file -> its name, a whole one, and how it is read."""
    plan = ExpertPlan.build([0, 1], ("original", "new"), {"new": (2, 1)})
    groups = group_languages(np.eye(3), ["hu", "el", "tr"], num_groups=2, resamples=0)
    grams = {"similarity": np.stack([np.eye(2)] * 2)}
    statistics = LanguageStatistics(("en", "hu"), (0, 1), grams, {"name": "m"})
    facts = CardFacts(name="m", kind="model", parents={"a": "mit"}, licence="mit", languages={"hu": "new"})
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.int64)}
    router = save({"x.A": torch.eye(2), "x.b.new": torch.ones(2)}, {_ROUTERS: json.dumps({"languages": ["hu"]})})
    delta = save({"w": torch.ones(2)}, {"peft-moe-delta post-training delta": json.dumps({"version": 2})})
    return {
        "text": ("t.jsonl", lines({"text": "one"}, {"text": "δύο\u2028"}), read_texts),
        "tasks": ("t.jsonl", lines({"prompt": "1+1=", "answer": "2"}), read_tasks),
        "plain text": ("t.txt", "words\nλέξεις".encode(), read_text),
        "plan": ("plan.json", plan.to_json().encode(), lambda path: ExpertPlan.from_json(read_text(path))),
        "groups": ("groups.json", groups.to_json().encode(), LanguageGroups.load),
        "statistics": ("statistics.json", statistics.to_json().encode(), LanguageStatistics.load),
        "report": ("report.json", b'{"format": 1, "languages": [], "models": [], "scores": []}', EvalReport.load),
        "card facts": ("card.json", facts.to_json().encode(), lambda path: CardFacts.from_json(read_text(path))),
        "card": ("README.md", b"---\nlicense: mit\nlanguage: [hu]\n---\n# m\n", lambda path: licence_of(path.parent)),
        "model's config": ("config.json", b'{"architectures": ["A"]}', _described),
        "adapter's config": (
            "adapter_config.json",
            b'{"languages": {"hu": "new"}, "language_ids": ["hu"]}',
            _described,
        ),
        "weights": ("model.safetensors", save(tensors), lambda path: dict(CheckpointReader(path))),
        "router statistics": ("r.safetensors", router, RouterStatistics.load),
        "delta": ("d.safetensors", delta, DeltaFile.open),
        "tokenizer": (
            "tokenizer.json",
            make_tokenizer().backend_tokenizer.to_str().encode(),
            lambda path: load_tokenizer(path.parent),
        ),
    }


def cases(seed: int) -> Iterator[Case]:
    """Damaged files, every kind in turn."""
    generator, known = random.Random(seed), kinds()
    while True:
        for kind, (name, whole, read) in known.items():
            how, content = _damaged(whole, generator)
            yield f"{kind}: {how}", _call(name, content, read)


def _call(name: str, content: bytes, read: Read) -> Callable[[], None]:
    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                read_from(Path(folder), name, content, read)
            finally:
                path = Path(folder) / name
                if not path.is_file() or path.read_bytes() != content:
                    raise AssertionError(f"{name} is lost or changed by reading it")

    return call


def read_from(folder: Path, name: str, content: bytes, read: Read) -> None:
    """Write a file, with what a reader looks for beside it, and read it."""
    (folder / name).write_bytes(content)
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    read(folder / name)


def _damaged(whole: bytes, generator: random.Random) -> tuple[str, bytes]:
    """What happened, and what is left."""
    position, width = generator.randrange(len(whole)), generator.randrange(1, 40)
    byte = bytes([generator.choice(TELLING)])
    kind = generator.randrange(8)
    if kind == 0:
        return f"cut at {position}", whole[:position]
    if kind == 1:
        return f"{width} bytes missing at {position}", whole[:position] + whole[position + width :]
    if kind == 2:
        return f"{byte!r} at {position}", whole[:position] + byte + whole[position + 1 :]
    if kind == 3:
        return f"{byte!r} pushed in at {position}", whole[:position] + byte + whole[position:]
    if kind == 4:
        return "noise", generator.randbytes(width)
    if kind == 5:
        return "another encoding", whole.decode("utf-8", "replace").encode("utf-16")
    return _foreign(whole, generator)


def _foreign(whole: bytes, generator: random.Random) -> tuple[str, bytes]:
    """A value of another kind somewhere in a JSON document, or in the document's place."""
    value = generator.choice(FOREIGN)
    try:
        document = json.loads(whole)
    except ValueError:
        return f"nothing but {value!r}", json.dumps(value).encode()
    places = list(_places(document))
    container, key = generator.choice(places) if places else (None, None)
    if container is None:
        document = value
    else:
        container[key] = value
    return f"{value!r} at {key!r}", json.dumps(document).encode()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key, the document's own place last."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from ((c, k) for c, k in _places(document[key]) if c is not None)
    yield None, None


def _described(path: Path) -> CardFacts:
    return CardFacts.of(path.parent, name="m")


_ADAPTER = b'{"languages": {"hu": "new"}, "language_ids": ["hu"]}'
_ROUTERS = "peft-moe-delta router statistics"
