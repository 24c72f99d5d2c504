"""What the benchmarks share: cases that take turns, ratios taken round by round, tables in Markdown.

Absolute times on a shared machine drift within a minute. Cases that take turns (A B C, A B C, ...) meet the same
drift, so the ratio within a round hardly feels it, and the median over rounds drops those in which something else ran.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Both are read when torch is imported. Huge pages for large tensors; threads that wait asleep, so that on a busy
# machine none spins through the turn of the one it waits for.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

Seconds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, with their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: Seconds, name: str, reference: str) -> Ratio:
        """What one case took as a multiple of another."""
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds[reference], strict=True)]
        return cls(*(statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def take_turns(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every case in every round; the `warm_up` rounds before them are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(warm_up + rounds):
        for name, case in cases.items():
            start = clock()
            case()
            if index >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def keep_memory() -> None:
    """Let glibc keep freed memory for the next tensor, as a GPU's caching allocator does.

    Left alone it gives every large tensor back to the system, and each new one is faulted in page by page: a tenth of
    the time of a layer, and most of its noise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        most_mmaps, trim_threshold = -4, -1
        mallopt(most_mmaps, 0)
        mallopt(trim_threshold, -1)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A titled Markdown table; the first column is text, the others are figures."""
    print(f"\n**{title}**\n")
    print(f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(f"\n{conditions()}", flush=True)


def conditions() -> str:
    """Processor, threads and versions, and how busy the machine was."""
    busy = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return (
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads{busy}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}."
    )


def verdict(name: str, value: float, limit: float) -> str:
    """One line for a figure with a target."""
    return f"- {name}: {value:.2f}, {'within' if value <= limit else 'OVER'} the limit of {limit:.2f}"
