"""The learning tests under other arithmetic, threads and seeds, and how much room each figure leaves.

    python tests/portable.py [--runs 12] [--workers 2] [arguments of pytest]

Every combination of instruction set, kernels and threads runs once, each with a seed offset of its own: twelve runs
where every pair of ways with ten seeds would take 120. A figure's spread over them is that of seeds and arithmetic
together. Fails where a test fails, or where a figure's mean is less than three standard deviations from its bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from chance import Figure

HERE = Path(__file__).resolve().parent
ROOM = 3.0
"""Standard deviations between a figure's mean and its bound, at least."""

INSTRUCTIONS = {"default": {"ATEN_CPU_CAPABILITY": "default"}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2"}, "own": {}}
# Products of fp32 matrices come from MKL or oneDNN, which do not read ATen's variable.
KERNELS = {"low": {"DNNL_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}, "own": {}}
THREADS = {"1": {"OMP_NUM_THREADS": "1"}, "2": {"OMP_NUM_THREADS": "2"}}
VARIED = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Way:
    """One way of running the tests: what it is called, and the environment that makes it."""

    name: str
    environment: Mapping[str, str]


WAYS = [
    Way(
        f"instructions {i}, kernels {k}, threads {t}, seed {number}",
        {**INSTRUCTIONS[i], **KERNELS[k], **THREADS[t], "PEFT_MOE_DELTA_TEST_SEED": str(number)},
    )
    for number, (i, k, t) in enumerate(product(INSTRUCTIONS, KERNELS, THREADS), start=1)
]
"""The first is the cheapest check of all: the oldest instructions, other seeds."""


@dataclass(frozen=True)
class Margin:
    """A figure over all runs: `room` is in standard deviations, infinite where it is always the same."""

    figure: Figure
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def worst(self) -> float:
        return max(self.values) if self.figure.below else min(self.values)

    @property
    def room(self) -> float:
        distance = self.figure.bound - self.mean if self.figure.below else self.mean - self.figure.bound
        return distance / self.deviation if self.deviation else float("inf") if distance > 0 else float("-inf")


def margins(figures: Iterable[Figure]) -> list[Margin]:
    """Figures of all runs, gathered by test, name and side; the tightest first."""
    gathered: dict[tuple[str, str, bool], list[Figure]] = defaultdict(list)
    for figure in figures:
        gathered[figure.test, figure.name, figure.below].append(figure)
    found = [Margin(each[0], tuple(figure.value for figure in each)) for each in gathered.values()]
    return sorted(found, key=lambda margin: (margin.room, margin.figure.test))


def table(found: list[Margin]) -> str:
    """Markdown, a line a figure."""
    lines = ["| test | mean | deviation | worst | bound | room |", "|---|---|---|---|---|---|"]
    for margin in found:
        figure = margin.figure
        name = f"{figure.test} {figure.name}".strip()
        bound = f"{'<' if figure.below else '>'} {figure.bound:.4g}"
        numbers = f"{margin.mean:.4g} | {margin.deviation:.2g} | {margin.worst:.4g} | {bound} | {margin.room:.1f}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def run(way: Way, file: Path, workers: int, arguments: list[str]) -> bool:
    """Whether the learning tests pass this way; their figures go to the file."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIED}
    environment |= {**way.environment, "PEFT_MOE_DELTA_TEST_MARGINS": str(file), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "learning", "-n", str(workers), *arguments]
    return subprocess.run(command, cwd=HERE.parent, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(WAYS), choices=range(1, len(WAYS) + 1), metavar="1-12")
    parser.add_argument("--workers", type=int, default=2, help="test processes of a run")
    options, arguments = parser.parse_known_args()  # what is left goes to pytest
    own = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()}, {os.cpu_count()} cores; the machine's own instructions are {own}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.jsonl"
        failed = []
        for number, way in enumerate(WAYS[: options.runs], start=1):
            print(f"== run {number} of {options.runs}: {way.name}", flush=True)
            if not run(way, file, options.workers, arguments):
                failed.append(way)
        found = margins(Figure.read(file))
    print(table(found))
    tight = [margin for margin in found if margin.room < ROOM]
    for way in failed:
        print(f"FAILED: {way.name}")
    for margin in tight:
        print(f"TIGHT: {margin.figure.test} {margin.figure.name}: {margin.room:.1f} standard deviations, need {ROOM}")
    print(f"{len(found)} figures in {options.runs} runs: {len(failed)} runs failed, {len(tight)} figures are too tight")
    return int(bool(failed or tight))


if __name__ == "__main__":
    sys.exit(main())
