"""The GPU suite: what the package does on one card, against the CPU in fp32.

`make test-gpu` runs it and sets DEVICE (`cuda`, or `cpu` to try the suite itself); `make test` does not collect it.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

collect_ignore_glob = [] if "DEVICE" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that is tried."""
    chosen = torch.device(os.environ["DEVICE"])
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here; `make test-gpu DEVICE=cpu` tries the suite itself")
    return chosen


@pytest.fixture(autouse=True)
def cleared(device: torch.device) -> Any:
    """Nothing compiled, and no memory, is left for the next test."""
    yield
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def on(model: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A copy on the device; in a 16-bit dtype all of it but the routers, as PEFT loads an adapter."""
    moved = copy.deepcopy(model)
    for name, module in moved.named_modules():
        if not any(part.startswith(("moe_delta_router", "moe_delta_classifier")) for part in name.split(".")):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return moved.to(device)


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A call's arguments, tensors on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal to the CPU in fp32: each number in fp32, all together in 16 bits, where a few tokens may change experts."""
    found = found.detach().cpu().float()
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected.detach(), atol=2e-4, rtol=1e-3)
        return
    off = ((found - expected).norm() / expected.norm()).item()
    assert off < 0.1, f"{off:.3f} of the expected size apart in {dtype}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of what trains, on the CPU."""
    return {n: p.grad.detach().cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
