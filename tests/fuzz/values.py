"""Values that nobody means to give, and files that are not what they were."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

TEXTS = [
    *("", " ", "0", "-1", "-3", "1", "3", "5", "1.5", "-0.5", "1e-3", "1e400", "nan", "inf", "-inf", "1e9", "9" * 20),
    *("0x10", "1_000", "no", "yes", "None", "null", "~", "true", "auto", "all", "learned", "language", "classifier"),
    *("=", "a=", "=b", "a=b", "a=b=c", "hu=1", "hu=nan", "original=1", "hu_group=0.5", "hu_group=x", ",", "hu,,el"),
    *("/proc/nowhere", "/proc/nowhere/at/all", ".", "..", "http://example.invalid/x", "org/model", "a/b/c"),
    *("-", "--", "--help me", "%s", "{x}", "\\", "'", '"', "\t", "a\nb", "\x00", "\ud800", "\u2028", "é", "😀"),
    *("hu_Latn-HU", "zz", "x" * 5000, "*", "[", "(?P<", "5GB", "-5GB", "5XB", "1e3MB", "stock", "float32"),
]
"""What is typed where something else is expected."""

NUMBERS = [
    *(0, 1, 2, -1, -3, 7, 2**31, 2**63, 10**30),
    *(0.0, 0.5, -0.5, 1.5, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")),
]


def bad_value(random: Random, depth: int = 0) -> Any:
    """Anything that YAML, JSON or Python can say."""
    kind = random.randrange(9 if depth < 2 else 6)
    if kind == 0:
        return random.choice([None, True, False])
    if kind in (1, 2):
        return random.choice(NUMBERS)
    if kind in (3, 4, 5):
        return random.choice(TEXTS)
    if kind in (6, 7):
        return [bad_value(random, depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(TEXTS): bad_value(random, depth + 1) for _ in range(random.randrange(4))}


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside of nested mappings and lists."""
    found = [here] if here else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*here, key))
    return found


def spoilt(random: Random, data: Any) -> Any:
    """A copy of nested fields in which a value or two is replaced, gone, renamed or new."""
    data = json.loads(json.dumps(data))
    for _ in range(random.choice([1, 1, 1, 2])):
        *path, last = random.choice(places(data) or [("new",)])
        holder = data
        for key in path:
            holder = holder[key]
        job = random.randrange(6)
        if job == 0:
            del holder[last]
        elif job == 1 and isinstance(holder, dict):
            holder[random.choice(TEXTS)] = holder.pop(last)
        elif job == 2 and isinstance(holder, dict):
            holder[random.choice([*holder, *TEXTS])] = bad_value(random)
        else:
            holder[last] = bad_value(random)
    return data


def damaged(random: Random, file: Path, copy: Path) -> str:
    """A copy of a file that is cut, flipped, emptied, not UTF-8, or another JSON."""
    content = file.read_bytes()
    job = random.randrange(6)
    if job == 0:
        content = content[: random.randrange(len(content) + 1)]
    elif job == 1:
        content = b""
    elif job == 2:
        where = random.randrange(max(1, len(content)))
        content = content[:where] + bytes([random.randrange(256)]) + content[where + 1 :]
    elif job == 3:
        content = b"\xff\xfe" + content
    elif job == 4:
        content = json.dumps(bad_value(random)).encode("utf-8", "surrogatepass")
    else:
        try:
            content = json.dumps(spoilt(random, json.loads(content))).encode("utf-8", "surrogatepass")
        except ValueError:
            content = random.randbytes(200)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)
    return str(copy)
