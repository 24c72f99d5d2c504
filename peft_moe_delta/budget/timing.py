"""How long a training takes here: a few of its steps, timed.

In: a `Job`. Out: seconds of one pass. Weights are random and no text is read, as a step's cost depends on shapes.
"""

from __future__ import annotations

import statistics
import time

import torch

from .measure import Job, build, rows

PASSES = 3


def seconds_of_a_pass(job: Job) -> float:
    """The median of three passes, forward, backward and the optimizer's step, after one that warms up; on the first GPU
    where there is one.

    Raises:
        ArchitectureError, PlanError: as `measure`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(job).to(device)
    batch = {name: tensor.to(device) for name, tensor in rows(job).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return statistics.median([_seconds(job, model, batch, optimizer, device) for _ in range(1 + PASSES)][1:])


def _seconds(
    job: Job, model: torch.nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, device: str
) -> float:
    begun = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=job.autocast):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
