"""All runs of the study, side by side and resumable: pairs, then learning rates, then the runs themselves.

In: a `Study`. Out: a JSON file for each run and each trial of a learning rate; what is there is not done again, so the
study may be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from peft_moe_delta.files import write_text

from .material import Material, material, pair
from .methods import METHODS
from .runs import Run, carry_out, validate
from .scores import DOCUMENTS

RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Study:
    """What is run, and where.

    Attributes:
        lengths: pair -> numbers of steps.
        seeds: random seeds.
        methods: names.
        rates: learning rates that every method is tried with, on the first seed.
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
        default_factory=lambda: {"qwen3": (40, 160, 640), "llama": (160,), "qwen3-large-delta": (160,)}
    )
    seeds: Sequence[int] = (0, 1, 2)
    methods: Sequence[str] = tuple(METHODS)
    rates: Sequence[float] = RATES
    tried: int = 160

    def text(self) -> Material:
        return material(self.shared, self.interface)

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """Pairs that are needed, by name and seed."""
        return [(name, seed) for seed in self.seeds for name in self.lengths]

    @property
    def trials(self) -> list[Run]:
        """Runs by which learning rates are chosen."""
        trained = [m for m in self.methods if METHODS[m].trains]
        rates = self.rates if len(self.rates) > 1 else ()
        return [Run(p, m, self.tried, self.seeds[0], rate) for p in self.lengths for m in trained for rate in rates]

    @property
    def runs(self) -> list[Run]:
        """The runs, the shortest first, so that what is there at any time has all seeds; rates are not chosen yet."""
        found = [
            Run(name, method, steps, seed)
            for seed in self.seeds
            for name, lengths in self.lengths.items()
            for method in self.methods
            for steps in (lengths if METHODS[method].trains else (0,))
        ]
        return sorted(found, key=lambda run: run.steps)

    def trial_file(self, run: Run) -> Path:
        return self.results / "rates" / f"{run.pair}-{run.method}-{run.rate:g}.json"

    def with_rate(self, run: Run) -> Run:
        """A run at the rate that was best on validation text."""
        if not METHODS[run.method].trains or len(self.rates) == 1:
            return replace(run, rate=self.rates[0] if METHODS[run.method].trains else 0.0)
        trials = [replace(run, steps=self.tried, seed=self.seeds[0], rate=rate) for rate in self.rates]
        found = [json.loads(self.trial_file(trial).read_text(encoding="utf-8")) for trial in trials]
        return replace(run, rate=max(found, key=lambda one: (one["reach"], one["criterion"]))["rate"])


def make_pair(study: Study, kind: tuple[str, int]) -> str:
    pair(*kind, study.text, study.pairs)
    return f"pair {kind[0]}, seed {kind[1]}"


def try_rate(study: Study, run: Run) -> str:
    file = study.trial_file(run)
    if not file.is_file():
        found = validate(run, pair(run.pair, run.seed, study.text, study.pairs), study.text())
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"rate": run.rate, "steps": run.steps, **found}) + "\n")
    return f"rate {run.rate:g} of {run.method}, {run.pair}"


def run_one(study: Study, run: Run) -> str:
    rated, file = study.with_rate(run), study.results / run.file
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["rate"] != rated.rate:
        file.unlink()  # of rates that were tried before others
    carry_out(rated, pair(run.pair, run.seed, study.text, study.pairs), study.text(), study.results)
    return run.file


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
    stages: list[tuple[Callable[[Study, Any], str], list[Any]]] = [
        (make_pair, [kind for kind in study.kinds if not (study.pairs / "{}-{}".format(*kind)).is_dir()]),
        (try_rate, [trial for trial in study.trials if not study.trial_file(trial).is_file()]),
        (run_one, study.runs),
    ]
    failed = 0
    # Fresh processes: a forked one would inherit threads that wait for locks.
    with ProcessPoolExecutor(workers, get_context("spawn"), one_thread) as pool:
        for work, jobs in stages:
            started = time.perf_counter()
            waiting = [pool.submit(work, study, job) for job in jobs]
            for number, future in enumerate(as_completed(waiting), 1):
                error = future.exception()
                failed += error is not None
                what = future.result() if error is None else "".join(traceback.format_exception(error))
                print(f"{number}/{len(jobs)}, {time.perf_counter() - started:.0f} s: {what}", flush=True)
    return failed


def quick(study: Study) -> Study:
    """One seed, one length, one learning rate and few methods."""
    few = ("base", "post-trained", "dense", "lora", "ours-by-language", "ours-by-context", "ours-learned")
    return replace(study, lengths={"qwen3": (40,)}, seeds=(0,), methods=few, rates=(3e-3,))
