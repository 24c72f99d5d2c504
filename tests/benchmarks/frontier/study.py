"""All runs of the study, side by side and resumable: pairs, then learning rates, then the runs themselves.

In: a `Study`. Out: a JSON file for each run and each trial of a learning rate; what is there is not done again, so the
study may be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from peft_moe_delta.files import write_text

from .material import Material, material, pair
from .methods import METHODS, by_training
from .runs import Run, carry_out, validate
from .scores import DOCUMENTS

RATES, FIRST = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 3e-3


@dataclass(frozen=True)
class Study:
    """What is run, and where.

    Attributes:
        lengths: pair -> numbers of steps, in the order in which they are run.
        seeds: random seeds.
        methods: names.
        rates: learning rates that may be tried, on the first seed; one alone is taken as it is.
        tried: steps of such a trial.
        shared, interface: folders of text, as in `material`.
        results: where scores are written.
        pairs: where models of pairs are kept.
    """

    shared: Path
    interface: Path
    results: Path
    pairs: Path
    lengths: Mapping[str, Sequence[int]] = field(
        default_factory=lambda: {"qwen3": (160, 40, 640), "llama": (160,), "qwen3-large-delta": (160,)}
    )
    seeds: Sequence[int] = (0, 1, 2)
    methods: Sequence[str] = tuple(METHODS)
    rates: Sequence[float] = RATES
    tried: int = 160

    def text(self) -> Material:
        return material(self.shared, self.interface)

    def runs(self, steps_of: Callable[[Sequence[int]], Sequence[int]], seeds: Sequence[int]) -> list[list[Run]]:
        """Runs that share a training side by side, all seeds of a length before the next; rates are not chosen yet."""
        untrained, trained = (
            [methods for methods in by_training(self.methods) if METHODS[methods[0]].trains is trains]
            for trains in (False, True)
        )
        return [
            [Run(name, method, steps, seed) for method in methods]
            for name, lengths in self.lengths.items()
            for steps, listed in ((0, untrained), *((steps, trained) for steps in steps_of(lengths)))
            for seed in seeds
            for methods in listed
        ]

    @property
    def trials(self) -> list[list[Run]]:
        """Runs whose learning rates are to be chosen."""
        found = self.runs(lambda lengths: (self.tried,), self.seeds[:1]) if len(self.rates) > 1 else []
        return [runs for runs in found if METHODS[runs[0].method].trains]

    def trial_file(self, run: Run) -> Path:
        return self.results / "rates" / f"{run.pair}-{run.method}-{run.rate:g}.json"

    def tried_rates(self, run: Run) -> dict[float, tuple[float, float]]:
        """Rate -> what it reached on validation text, of a run's pair and method."""
        files = {rate: self.trial_file(replace(run, rate=rate)) for rate in self.rates}
        found = {r: json.loads(f.read_text(encoding="utf-8")) for r, f in files.items() if f.is_file()}
        return {rate: (one["reach"], one["criterion"]) for rate, one in found.items()}

    def with_rate(self, run: Run) -> Run:
        """A run at the rate that was best on validation text."""
        if not METHODS[run.method].trains or len(self.rates) == 1:
            return replace(run, rate=self.rates[0] if METHODS[run.method].trains else 0.0)
        tried = self.tried_rates(run)
        return replace(run, rate=max(tried, key=lambda rate: tried[rate]))

    def to_choose(self) -> list[list[Run]]:
        """Trials that are not finished."""
        return [runs for runs in self.trials if any(untried(self, run) for run in runs)]

    def to_do(self) -> list[list[Run]]:
        """The runs of every pair, seed and length that is not all there, on whatever pair of models."""
        wanted = [(pair, seed, n) for pair, lengths in self.lengths.items() for n in lengths for seed in self.seeds]
        missing = [one for one in wanted if not self._is_whole(*one)]
        needed = {(pair, seed, steps) for pair, seed, n in missing for steps in (0, n)}
        listed = self.runs(lambda lengths: lengths, self.seeds)
        return [runs for runs in listed if (runs[0].pair, runs[0].seed, runs[0].steps) in needed]

    def _is_whole(self, pair: str, seed: int, steps: int) -> bool:
        wanted = [Run(pair, method, steps if METHODS[method].trains else 0, seed) for method in self.methods]
        digests = [folder.name.rpartition("-")[2] for folder in self.results.glob(f"{pair}-{seed}-*")]
        return any(
            all(rate_of(self.results / one.file(digest)) == one.rate for one in map(self.with_rate, wanted))
            for digest in digests
        )


def rate_of(file: Path) -> float | None:
    """The learning rate of a run that is there; None where it is not."""
    return float(json.loads(file.read_text(encoding="utf-8"))["rate"]) if file.is_file() else None


def make_pair(study: Study, kind: tuple[str, int]) -> str:
    pair(*kind, study.text, study.pairs)
    return f"pair {kind[0]}, seed {kind[1]}"


def choose_rates(study: Study, runs: Sequence[Run]) -> str:
    """Try learning rates until both neighbours of the best are worse, or there are none."""
    kept = pair(runs[0].pair, runs[0].seed, study.text, study.pairs)
    for run in runs:
        while rates := untried(study, run):
            for one in (replace(run, rate=rate) for rate in rates):
                file = study.trial_file(one)
                file.parent.mkdir(parents=True, exist_ok=True)
                found = validate(one, kept, study.text())
                write_text(file, json.dumps({"rate": one.rate, "steps": one.steps, **found}) + "\n")
    return f"rates of {', '.join(run.method for run in runs)}, {runs[0].pair}"


def untried(study: Study, run: Run) -> list[float]:
    """The rates to be tried next: the first one, then the neighbours of the best so far."""
    if not (tried := study.tried_rates(run)):
        return [FIRST]
    best = study.rates.index(max(tried, key=lambda rate: tried[rate]))
    return [rate for rate in study.rates[max(0, best - 1) : best + 2] if rate not in tried]


def carry_out_side_by_side(study: Study, runs: Sequence[Run]) -> str:
    """Those of one training that are not there yet, or are of a rate that was tried before others."""
    kept = pair(runs[0].pair, runs[0].seed, study.text, study.pairs)
    for run in map(study.with_rate, runs):
        file = study.results / run.file(kept.digest)
        if rate_of(file) != run.rate:
            file.unlink(missing_ok=True)
            carry_out(run, kept, study.text(), study.results)
    return ", ".join(run.file(kept.digest) for run in runs)


def one_thread() -> None:
    """How a worker begins: alone on its core, without bars in the log."""
    torch.set_num_threads(1)
    disable_progress_bar()


def carry_out_all(study: Study, workers: int) -> int:
    """Everything that is not there yet. Returns how many jobs failed; the others go on."""
    study.pairs.mkdir(parents=True, exist_ok=True)
    study.results.mkdir(parents=True, exist_ok=True)
    if not (study.results / DOCUMENTS).is_file():
        write_text(study.results / DOCUMENTS, json.dumps(study.text().sizes()) + "\n")
    failed = 0
    # Fresh processes: a forked one would inherit threads that wait for locks.
    with ProcessPoolExecutor(workers, get_context("spawn"), one_thread) as pool:
        for work, jobs in stages(study):
            started = time.perf_counter()
            waiting = [pool.submit(work, study, job) for job in jobs]
            for number, future in enumerate(as_completed(waiting), 1):
                error = future.exception()
                failed += error is not None
                what = future.result() if error is None else "".join(traceback.format_exception(error))
                print(f"{number}/{len(jobs)}, {time.perf_counter() - started:.0f} s: {what}", flush=True)
    return failed


def stages(study: Study) -> Iterator[tuple[Callable[[Study, Any], str], list[Any]]]:
    """What is done with what, one after another."""
    chosen = study.to_choose()
    yield make_pair, missing_pairs(study, chosen)
    yield choose_rates, chosen
    yield make_pair, missing_pairs(study, study.to_do())
    yield carry_out_side_by_side, study.to_do()


def missing_pairs(study: Study, runs: Sequence[Sequence[Run]]) -> list[tuple[str, int]]:
    """Names and seeds of pairs that runs need."""
    kinds = dict.fromkeys((listed[0].pair, listed[0].seed) for listed in runs)
    return [kind for kind in kinds if not (study.pairs / "{}-{}".format(*kind)).is_dir()]


def quick(study: Study) -> Study:
    """One seed, one length, one learning rate and few methods."""
    few = (
        "base",
        "post-trained",
        "dense",
        "lora",
        "over-context",
        "ours-by-language",
        "ours-by-context",
        "ours-learned",
    )
    return replace(study, lengths={"qwen3": (40,)}, seeds=(0,), methods=few, rates=(3e-3,))
