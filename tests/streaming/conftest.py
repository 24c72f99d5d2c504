"""Pico checkpoints on disk: a base, its post-trained sibling, and an adapter trained on the base."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import perturbed, pico, upcycle


@dataclass
class Trio:
    """Three folders, and the adapter in memory."""

    folder: Path
    model: PeftModel

    @property
    def paths(self):
        return [self.folder / name for name in ("base", "post", "adapter")]


def store(model, folder, dtype, **options):
    type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype).save_pretrained(
        folder, **options
    )


@pytest.fixture
def make_trio(tmp_path):
    """make_trio(family, dtypes=(base, post, experts), tied=..., **adapter options) -> Trio."""

    def make(family="llama", dtypes=(torch.float32,) * 3, tied=False, **options):
        base = pico(family, tie_word_embeddings=tied)
        store(base, tmp_path / "base", dtypes[0], max_shard_size="30KB")
        store(perturbed(base), tmp_path / "post", dtypes[1], max_shard_size="20KB")
        model = upcycle(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtypes[0]), trained=True, **options
        )
        for name, parameter in model.named_parameters():
            if "moe_delta_experts" in name:
                parameter.data = parameter.data.to(dtypes[2])
        model.save_pretrained(tmp_path / "adapter")
        return Trio(tmp_path, model)

    return make
