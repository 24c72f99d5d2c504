"""Tables and sentences of a comparison, from its committed scores alone: the same scores give the same text.

In: a JSON file of `comparison.py`. Out: `Scores`, whose figures are arrays of shape (1 + resamples, seeds), bits per
byte of the documents as they are and of paired bootstrap samples of them: the same documents are drawn for all rows and
seeds. Intervals are those of `frontier/intervals.py`: 95%, over documents and random seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from frontier.intervals import RESAMPLES, document_weights, interval
from frontier.tables import shown, table

from peft_moe_delta.evaluation.bootstrap import Interval


@dataclass(frozen=True)
class Scores:
    """What was scored.

    Attributes:
        kept: the file's content.
    """

    kept: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> Scores:
        return cls(json.loads(file.read_text(encoding="utf-8")))

    @property
    def seeds(self) -> list[Mapping[str, Any]]:
        return list(self.kept["seeds"])

    @cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        """How often each document of a language is drawn."""
        return {
            code: document_weights(len(sizes), RESAMPLES, index)
            for index, (code, sizes) in enumerate(sorted(self.kept["sizes"].items()))
        }

    def row(self, name: str) -> Mapping[str, Any]:
        """What is the same of a row with every seed: its costs."""
        found: Mapping[str, Any] = self.seeds[0]["rows"][name]
        return found

    def of(self, name: str, *codes: str) -> np.ndarray:
        """Bits per byte of a row, the mean over languages, (1 + resamples, seeds)."""
        each = []
        for code in codes:
            bits = np.array([one["rows"][name]["bits"][code] for one in self.seeds]).T
            drawn, sizes = self._weights[code], np.array(self.kept["sizes"][code])
            each.append((drawn @ bits) / (drawn @ sizes)[:, None])
        return np.mean(each, axis=0)

    def less(self, name: str, other: str, *codes: str) -> Interval:
        """One row less another one, the mean over languages."""
        return self.interval(self.of(name, *codes) - self.of(other, *codes))

    def interval(self, figure: np.ndarray) -> Interval:
        return interval(figure, min(map(len, self.kept["sizes"].values())))

    def costs(self, rows: Mapping[str, str]) -> str:
        """A table: what every row costs.

        Args:
            rows: name -> title.
        """
        head = ("", "parameters", "passed by a token", "MFLOPs per token", "trained", "tokens read", "learning rate")
        found = []
        for name, title in rows.items():
            cost, rate = self.row(name), self.kept["rates"].get(name.partition("/")[0])
            own = [f"{cost[key]:,}" for key in ("parameters", "active")]
            found.append(
                (title, *own, f"{cost['flops'] / 1e6:.2f}", f"{cost['trained']:,}", f"{cost['tokens']:,}",
                 f"{rate:g}" if rate else "")
            )  # fmt: skip
        return "Forward operations per token are counted on a training row.\n\n" + table(head, found)

    def setting(self) -> str:
        """What was run: steps, seeds and documents."""
        seeds = ", ".join(str(one["seed"]) for one in self.seeds)
        settings, fewest = self.kept["settings"], min(map(len, self.kept["sizes"].values()))
        rows, length = settings["step"]
        steps = ", ".join(f"{name} {number}" for name, number in settings["steps"].items())
        return (
            f"Steps of {rows} x {length} tokens: {steps}. Random seeds {seeds}; {fewest} "
            "held-out documents of each language, drawn at random; 95% intervals over documents and seeds."
        )


def values(figure: np.ndarray) -> str:
    """The mean over seeds."""
    return f"{float(figure[0].mean()):.3f}"


def word(found: Interval) -> str:
    """What an interval of a difference carries."""
    return "lower" if found.high < 0 else "higher" if found.low > 0 else "undecided"


def decided(found: Interval) -> str:
    """A difference and its word, for a cell."""
    return f"{shown(found)} {word(found)}"


def sentences(claims: Mapping[str, Interval]) -> str:
    """One line a claim, in the words that its interval carries; bits per byte, lower is better."""
    return "\n".join(f"- {claim}: {shown(found)}, {word(found)}." for claim, found in claims.items())


def differences(
    scores: Scores, pairs: Sequence[tuple[str, str]], titles: Mapping[str, str], columns: Mapping[str, Sequence[str]]
) -> str:
    """A table: pairs of rows, paired by document, for each column's languages."""
    rows: Iterator[Sequence[str]] = (
        (f"{titles[a]} less {titles[b]}", *(decided(scores.less(a, b, *codes)) for codes in columns.values()))
        for a, b in pairs
    )
    return table(("", *columns), list(rows))


def filled(page: str, name: str, made: str) -> str:
    """A page's text with what was made between the markers of a benchmark."""
    begin, end = f"<!-- {name}: begin, made by bench_{name}.py -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{made}\n\n{end}{rest.split(end)[1]}"
