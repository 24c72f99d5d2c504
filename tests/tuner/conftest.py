"""Adapters saved once for every way of loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from builders import logits, pico, token_batch, upcycle

KINDS = {
    "learned, full experts": {"routing": "learned"},
    "by language, low-rank experts": {"routing": "language", "expert_rank": 2},
}


@dataclass(frozen=True)
class Saved:
    """A base model and a trained adapter in their folders, a batch, and the logits that every road must give for it."""

    base: Path
    adapter: Path
    batch: dict[str, Tensor]
    logits: Tensor

    def load_base(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.base)


@pytest.fixture(scope="session")
def all_saved(tmp_path_factory) -> list[Saved]:
    base = tmp_path_factory.mktemp("base")
    pico().save_pretrained(base)
    batch = {"tokens": token_batch(), "language_ids": torch.tensor([0, 1, 3])}
    found = []
    for fields in KINDS.values():
        adapter = tmp_path_factory.mktemp("adapter")
        model = upcycle(AutoModelForCausalLM.from_pretrained(base), trained=True, **fields)
        model.save_pretrained(adapter)
        found.append(Saved(base, adapter, batch, logits(model, **batch)))
    return found


@pytest.fixture(params=range(len(KINDS)), ids=list(KINDS))
def saved(request, all_saved) -> Saved:
    return all_saved[request.param]
