"""Ways to spread a training over GPUs, and what each takes on one of them.

In: a `Job`, how many GPUs there are and how large they are. Out: a `Budget`: every strategy by part, which of them fit,
and what to change where the job as it is fits nowhere. One process is measured (`measure.py`); what an engine adds to
that or takes away is arithmetic, which stands here with its reasons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..kinds import size_text
from .measure import Job, Measured, measure

RANK = 16
"""Of the experts that are tried beside full ones."""

SHARE = 0.9
"""Of a GPU's memory that is planned with. CUDA itself, workspaces and fragmentation take the rest: no config tells how
much."""

_4_BIT_BYTES = 0.5 + 4 / 64
"""Of a number in 4 bits: bitsandbytes keeps an fp32 scale for every 64 of them."""

AS_IS = "as it is"
ONE, COPIES, SHARDED = "one GPU", "DDP", "FSDP2 or ZeRO-3"
_PARTS = ("base", "adapter", "gradients", "optimizer", "activations", "buffers", "total")


@dataclass(frozen=True)
class Strategy:
    """What one GPU holds, in bytes.

    Attributes:
        experts: the job as it is, or what is tried instead.
        engine: how it is spread over GPUs.
        base, adapter: weights, those of the experts and routers by themselves.
        gradients, optimizer: of what trains.
        activations: what a pass needs beside these, as `Measured.activations`.
        buffers: what the engine needs beside its share.
    """

    experts: str
    engine: str
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of it, as it is while gradients of several passes add up."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations + self.buffers

    def fits(self, memory: int) -> bool:
        """Whether a GPU of so many bytes has room for it."""
        return self.total <= SHARE * memory

    def __str__(self) -> str:
        return self.engine if self.experts == AS_IS else f"{self.experts}, {self.engine}"


@dataclass(frozen=True)
class Budget:
    """What a training takes, and where it fits.

    Attributes:
        job: the training.
        gpus: how many there are.
        memory: of each, in bytes.
        measured: one process of it.
        strategies: the job as it is, then with low-rank experts, then with these on a 4-bit base.
        advice: what would make the job as it is fit; empty where it fits.
    """

    job: Job = field(repr=False)
    gpus: int
    memory: int
    measured: Measured = field(repr=False)
    strategies: tuple[Strategy, ...]
    advice: tuple[str, ...]

    @property
    def fitting(self) -> tuple[Strategy, ...]:
        """The strategies that fit."""
        return tuple(strategy for strategy in self.strategies if strategy.fits(self.memory))

    @property
    def tokens(self) -> int:
        """Of a step, over all GPUs."""
        return self.gpus * self.job.tokens

    @property
    def flops(self) -> int:
        """Of a step, over all GPUs."""
        return self.gpus * self.measured.flops

    def hours(self, steps: int, speed: float) -> str:
        """A sentence: GPU hours of so many steps, where a GPU computes `speed` FLOP a second."""
        work = steps * self.flops
        return (
            f"{steps:,} steps: {steps * self.tokens / 1e6:,.1f} million tokens, {work / 1e15:,.1f} PFLOP, "
            f"{work / speed / 3600:,.2f} GPU hours at {speed / 1e12:,.0f} TFLOP a second."
        )

    def table(self) -> str:
        """Markdown: the job, every strategy by part, and what fits."""
        job, measured = self.job, self.measured
        dtype = str(job.dtype).removeprefix("torch.")
        lines = [
            f"Base: {measured.parameters / 1e9:,.2f} billion weights in {dtype}. Training: "
            f"{measured.trainable / 1e9:,.2f} billion. A step: {job.batch_size} x {job.sequence_length:,} tokens on a "
            f"GPU, {self.tokens:,} in all; {self.flops / 1e12:,.1f} TFLOP, the optimizer's left out.",
            "",
            f"| GB on a GPU | {' | '.join(_PARTS)} | fits {self.memory / 1e9:,.0f} GB |",
            "|---|" + "---:|" * len(_PARTS) + "---|",
        ]
        for strategy in self.strategies:
            figures = [f"{getattr(strategy, part) / 1e9:,.1f}" for part in _PARTS]
            lines.append(f"| {strategy} | {' | '.join(figures)} | {'yes' if strategy.fits(self.memory) else 'no'} |")
        lines.append("")
        if self.advice:
            lines.append(f"As it is, it does not fit. What helps: {'; '.join(self.advice)}.")
        return "\n".join([*lines, f"What fits: {'; '.join(map(str, self.fitting)) or 'nothing of these'}."])


def plan_budget(job: Job, gpus: int, memory: int) -> Budget:
    """Measure a training, and lay it over GPUs.

    Args:
        job: the training, as each GPU sees it.
        gpus: how many there are.
        memory: of each, in bytes.

    Raises:
        ArchitectureError: the model cannot be upcycled.
        PlanError: the adapter does not fit the model.
    """
    measured = measure(job)
    strategies = list(_spread(AS_IS, measured, gpus))
    if any(strategy.fits(memory) for strategy in strategies):
        advice: list[str] = []
    else:
        advice = list(_advice(job, measured, memory))
    if job.adapter.expert_rank is None:
        adapter = replace(job.adapter, expert_rank=min(RANK, job.model.get_text_config().hidden_size))
        job_of_rank = replace(job, adapter=adapter)
        strategies += _spread(f"experts of rank {RANK}", low_rank := measure(job_of_rank), gpus)
    else:
        job_of_rank, low_rank = job, measured
    if job.dtype != torch.bfloat16:  # what 4 bits leave out is in 16
        low_rank = measure(replace(job_of_rank, dtype=torch.bfloat16))
    name = f"experts of rank {job.adapter.expert_rank or RANK} on a 4-bit base"
    strategies += [s for s in _spread(name, _packed(low_rank), gpus) if s.engine != SHARDED]
    return Budget(job, gpus, memory, measured, tuple(strategies), tuple(advice))


def _spread(experts: str, one: Measured, gpus: int) -> Iterator[Strategy]:
    alone = Strategy(experts, ONE, one.base, one.experts, one.gradients, one.optimizer, one.activations)
    yield alone
    if gpus > 1:
        # DDP copies gradients into buckets of the same size, which travel while the next ones are computed.
        yield replace(alone, engine=COPIES, buffers=one.gradients)
        yield replace(
            alone,
            engine=SHARDED,
            base=math.ceil(one.base / gpus),
            adapter=math.ceil(one.experts / gpus),
            gradients=math.ceil(one.gradients / gpus),
            optimizer=math.ceil(one.optimizer / gpus),
            buffers=_gathered(one),
        )


def _gathered(one: Measured) -> int:
    """What is whole at a time where weights are sharded: what is outside of layers, the layer at work with its
    gradients before they are scattered, and the weights of the next one, which are on their way."""
    return one.outside + 2 * one.layer + one.layer_gradients


def _packed(one: Measured) -> Measured:
    """With the base's linear maps in 4 bits: in decoder layers, as bitsandbytes leaves the embeddings alone."""
    return replace(one, base=one.base - one.linear_bytes + math.ceil(_4_BIT_BYTES * one.linear))


def _advice(job: Job, one: Measured, memory: int) -> Iterator[str]:
    """What would make a job fit that fits nowhere as it is."""
    if not job.checkpointing:
        less = measure(replace(job, checkpointing=True)).activations
        yield (
            f"activation checkpointing (--checkpointing) brings activations from {size_text(one.activations)} to "
            f"{size_text(less)}"
        )
    shared = one.total - one.activations
    room = SHARE * memory - one.activations - _gathered(one)
    if room > 0:
        yield f"{SHARDED} has room for it on {math.ceil(shared / room)} GPUs of this size"
        return
    length = job.sequence_length if job.batch_size > 1 else max(2, job.sequence_length // 2)
    less = measure(replace(job, batch_size=1, sequence_length=length)).activations
    yield (
        f"a pass of 1 x {length:,} tokens has {size_text(less)} of activations, and a step may be several passes "
        "whose gradients add up"
    )
    if job.autocast and not job.experts_as_base:
        yield (
            "autocast keeps a bf16 copy of fp32 experts through a pass, which experts in the base's dtype do not need "
            "(--expert-dtype base)"
        )
