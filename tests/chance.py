"""What depends on chance in a test: the seeds of all that it draws, and figures that come out of drawing and training.

`PEFT_MOE_DELTA_TEST_SEED=n` draws everything anew. A test that asserts how well something was learned, or another
figure that differs from seed to seed, takes the fixture `holds`, which makes it a learning test (`-m learning`): it has
to hold with room to spare for any seed, number of threads and instruction set. Where `PEFT_MOE_DELTA_TEST_MARGINS`
names a file, every figure goes into it, a JSON line each. `portable.py` runs these tests in many ways and reads it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OFFSET = int(os.environ.get("PEFT_MOE_DELTA_TEST_SEED", "0"))
APART = 1_000_003
"""Between seeds of one name under two offsets: the small seeds that tests write never meet one of another offset."""


def shifted(seed: int = 0) -> int:
    """A seed that a test writes, under the offset of this run."""
    return seed + APART * OFFSET


@dataclass(frozen=True)
class Figure:
    """One figure of one run of a test, and the bound that it has to keep to."""

    test: str
    name: str
    value: float
    bound: float
    below: bool

    @property
    def kept(self) -> bool:
        return self.value < self.bound if self.below else self.value > self.bound

    @classmethod
    def read(cls, file: Path) -> list[Figure]:
        """Every figure in a file, none where there is no file."""
        return [cls(**json.loads(line)) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


class Holds:
    """`holds(loss, below=0.1)`, `holds(share, above=0.9, name="hu")`: asserts, and records how much room there was."""

    def __init__(self, test: str, file: str | None) -> None:
        self.test, self.file = test, file

    def __call__(self, value: Any, *, above: float | None = None, below: float | None = None, name: str = "") -> None:
        """Asserts one figure.

        Args:
            value: a number, or a tensor of one.
            above, below: the bounds, one of them or both, neither included.
            name: tells the figures of one test apart.
        """
        bounds = [(bound, of_below) for bound, of_below in ((above, False), (below, True)) if bound is not None]
        assert bounds, "`holds` needs `above` or `below`"
        figures = [Figure(self.test, name, float(value), float(bound), of_below) for bound, of_below in bounds]
        if self.file:
            with Path(self.file).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(figure)) + "\n" for figure in figures)
        for figure in figures:
            side = "below" if figure.below else "above"
            assert figure.kept, f"{name or 'the figure'} is {figure.value:.6g}, expected {side} {figure.bound:.6g}"
