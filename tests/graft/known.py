"""What a commit makes, as hashes: adapters, grafted adapters, stock exports and deltas of pico models.

`python tests/graft/known.py FILE [CASE ...]` writes {case: {tensor: sha256}} as JSON; run with another commit's package
and tests on PYTHONPATH it says what that one makes. Only names that both have may be used here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import FAMILIES, perturbed, pico, upcycle
from peft_moe_delta import PostTrainingDelta, graft_checkpoint

ROUTINGS = {"learned": {}, "language": {}, "classifier": {"classifier_layers": [1]}}
CASES = {
    f"{family}-{'full' if rank is None else 'low-rank'}-{routing}": (family, rank, routing)
    for family in FAMILIES
    for rank in (None, 4)
    for routing in ROUTINGS
}


def exact_weights(model):
    """Give a model weights that are the same on every machine: sums of a few powers of 2, no random numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            steps = torch.arange(parameter.numel()) * 7919 + zlib.crc32(name.encode())
            values = ((steps % 509).float() - 254) / 1024
            parameter.copy_(values.reshape(parameter.shape) + (1 if "norm" in name and parameter.dim() == 1 else 0))
    return model


def exact_noise(model, step, size):
    """Add to every weight a number that depends on its name and place alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            steps = torch.arange(parameter.numel()) * step + zlib.crc32(name.encode())
            parameter.add_((((steps % 127).float() - 63) / size).reshape(parameter.shape))
    return model


def train(model):
    """Move every tensor of an adapter by noise that depends on its name alone."""
    state = get_peft_model_state_dict(model)
    for key, tensor in state.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        size = 0.1 if key.endswith((".A", ".B")) else 0.05
        noise = torch.randn(tensor.shape, generator=generator) * size
        state[key] = (noise if key.endswith((".A", ".B")) or "router" in key else tensor + noise.to(tensor.dtype)).to(
            tensor.dtype
        )
    set_peft_model_state_dict(model, state)
    return model


def hashes(tensors):
    """Name -> sha256 of a tensor's bytes, with its dtype and shape."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"
    return found


def of_folder(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return hashes(tensors)


def make(family, rank, routing, folder):
    """Everything that one adapter becomes."""
    pico(family).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    perturbed(base).save_pretrained(folder / "post")
    model = train(upcycle(base, routing=routing, expert_rank=rank, **ROUTINGS[routing]))
    model.save_pretrained(folder / "adapter")
    model.graft(folder / "post", expert_scale=0.75).save_pretrained(folder / "grafted")
    options = {"language": "az"} if routing == "language" else {"remote_code": True}
    stock = model.merge_and_graft(folder / "post", scale=0.5, expert_scale={"uralic": 0.25}, **options)
    stock.save_pretrained(folder / "stock")
    states = [copy.deepcopy(m).state_dict() for m in (base, AutoModelForCausalLM.from_pretrained(folder / "post"))]
    dense = [{n: t for n, t in s.items() if "moe_delta" not in n and "base_layer" not in n} for s in states]
    both = dense[0].keys() & dense[1].keys() - {"lm_head.weight"}
    PostTrainingDelta.from_checkpoints(*({n: s[n] for n in s if n in both} for s in dense)).save(
        folder / "memory.delta"
    )
    PostTrainingDelta.from_checkpoints(folder / "base", folder / "post").save(folder / "files.delta")
    found = {name: of_folder(folder / name) for name in ("adapter", "grafted", "stock")}
    found |= {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("memory.delta", "files.delta")
    }
    target = "stock" if routing == "language" else "adapter"
    where = (folder / "base", folder / "post", folder / "adapter", folder / "out")
    graft_checkpoint(*where, target=target, **({"language": "az"} if routing == "language" else {}))
    return found | {"files": of_folder(folder / "out")}


def main(output, cases):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for case in cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case] = make(*CASES[case], Path(folder))
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
