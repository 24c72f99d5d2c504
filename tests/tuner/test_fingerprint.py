"""The record of an adapter's base: every tensor counts, dtypes and files do not, and nothing whole is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from builders import FAMILIES, pico, randomise, upcycle
from peft_moe_delta.checkpoint import CheckpointReader
from peft_moe_delta.errors import CheckpointError
from peft_moe_delta.tuner.blocks import mlp_blocks
from peft_moe_delta.tuner.fingerprint import base_weights, check_fingerprint, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST_VERSION = json.loads((Path(__file__).parent / "fingerprints_674a637.json").read_text())


def mlps_of(model):
    """What an adapter over the whole model transforms."""
    config = upcycle(copy.deepcopy(model)).peft_config["default"]
    blocks = mlp_blocks(model, config)
    return [
        {inner: f"{name}.{inner}" for inner, _ in module.named_parameters()}
        for _, (name, module) in sorted(blocks.items())
    ]


def counted(model):
    """Weights that no random generator makes: the same on every machine."""
    for number, parameter in enumerate(model.parameters()):
        steps = torch.arange(parameter.numel(), dtype=torch.float64) * 37 + number
        parameter.data = ((steps % 101 - 50) / 630).to(parameter.dtype).view(parameter.shape)
    return model


def stored(model, folder, dtype=torch.float32):
    """A checkpoint in shards; read back where the dtype is to be that of the file."""
    type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype).save_pretrained(
        folder, max_shard_size="20KB"
    )
    return CheckpointReader(folder)


class HeadersOnly(CheckpointReader):
    """Files from which no tensor may be read whole."""

    def __getitem__(self, name):
        raise AssertionError(f"{name} is read whole")


@pytest.mark.parametrize("part", ["up_proj", "down_proj", "self_attn", "norm", "embed_tokens", "lm_head", "layers.1."])
def test_an_adapter_is_refused_over_a_base_with_noise_in_any_part(part, tmp_path):
    upcycle(pico()).save_pretrained(tmp_path)
    base = pico()
    for name, parameter in base.named_parameters():
        if part in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    with pytest.raises(CheckpointError, match=f"other base weights: of 21 tensors .*{part}"):
        PeftModel.from_pretrained(base, tmp_path)
    PeftModel.from_pretrained(base, tmp_path, verify_base=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_every_single_tensor_counts(family, dtype):
    model = pico(family)
    weights, mlps = base_weights(model), mlps_of(model)
    saved = fingerprint({name: tensor.to(dtype) for name, tensor in weights.items()}, len(mlps))
    check_fingerprint(saved, weights, mlps, verify_weights=True)
    for name, tensor in weights.items():
        changed = weights | {name: tensor + 0.05 * torch.randn(tensor.shape)}
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        with pytest.raises(CheckpointError, match="1 differ, such as"):
            check_fingerprint(saved, changed, mlps, verify_weights=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_memory_give_one_record_in_every_dtype(family, tmp_path):
    for tied in (False, True):
        model = pico(family, tie_word_embeddings=tied)
        mlps, records = mlps_of(model), []
        for dtype in DTYPES:
            folder = tmp_path / f"{dtype}-{tied}"
            stored(model, folder, dtype)
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            in_memory, on_disk = (
                fingerprint(base_weights(loaded), len(mlps)),
                fingerprint(HeadersOnly(folder), len(mlps)),
            )
            assert in_memory["tensors"] == on_disk["tensors"]
            records.append(on_disk)
            for saved in records:
                for weights in (CheckpointReader(folder), base_weights(loaded)):
                    check_fingerprint(saved, weights, mlps, verify_weights=True)
        assert records[0]["tensors"] == records[1]["tensors"]  # bf16 is what all are rounded to


def test_noise_that_fp16_could_hide_is_still_noticed():
    """Of fp32 weights in fp16 one number in 16 comes out one bf16 step away; noise moves more, or further."""
    model = pico()
    weights, mlps = base_weights(model), mlps_of(model)
    saved = fingerprint({name: tensor.half() for name, tensor in weights.items()}, len(mlps))
    for noise in (2e-3, 0.05):
        changed = {name: tensor * (1 + noise * torch.randn(tensor.shape)) for name, tensor in weights.items()}
        with pytest.raises(CheckpointError, match="other base weights"):
            check_fingerprint(saved, changed, mlps, verify_weights=True)


def test_names_may_lack_their_prefix_and_old_files_hold_buffers(tmp_path):
    model = pico()
    mlps = mlps_of(model)
    saved = fingerprint(base_weights(model), len(mlps))
    tensors = {name.removeprefix("model."): tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {f"layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    short = [{inner: name.removeprefix("model.") for inner, name in block.items()} for block in mlps]
    check_fingerprint(saved, CheckpointReader(tmp_path), short, verify_weights=True)
    assert fingerprint(CheckpointReader(tmp_path), len(short))["tensors"] == saved["tensors"]


def test_a_vocabulary_that_was_resized_or_padded_is_the_same_base():
    model, mlps = pico(), mlps_of(pico())
    saved = fingerprint(base_weights(model), len(mlps))
    for rows in (90, 128, 4000):
        resized = copy.deepcopy(model)
        resized.resize_token_embeddings(rows, mean_resizing=False)
        check_fingerprint(saved, base_weights(resized), mlps, verify_weights=True)
        resized.get_input_embeddings().weight.data[:64] += 0.1
        with pytest.raises(CheckpointError, match="1 differ, such as embed_tokens.weight"):
            check_fingerprint(saved, base_weights(resized), mlps, verify_weights=True)


def test_adapters_that_lie_over_the_base_are_no_part_of_it(tmp_path):
    """LoRA on attention, modules to save, new tokens and another adapter of ours leave the record as it is."""
    plain = fingerprint(base_weights(pico()), 2)
    model = get_peft_model(
        pico(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"])
    )
    randomise(model.base_model.model.lm_head.modules_to_save, 3)
    assert fingerprint(base_weights(model.base_model.model), 2) == plain
    model = upcycle(pico(), trained=True, adapter="first")
    model.add_adapter("second", copy.deepcopy(model.peft_config["first"]))
    assert model.peft_config["second"].record.base_fingerprint == plain


def test_what_cannot_be_read_is_not_compared():
    """Offloaded weights, and integers that stand for weights: a quantised copy is known by what it keeps."""
    model, mlps = pico(), mlps_of(pico())
    saved = fingerprint(base_weights(model), len(mlps))
    for packed in (torch.empty(48, 32, device="meta"), torch.zeros(48, 32, dtype=torch.int8)):
        weights = {
            name: nn.Parameter(packed, requires_grad=False) if name.endswith("up_proj.weight") else tensor
            for name, tensor in base_weights(model).items()
        }
        check_fingerprint(saved, weights, mlps, verify_weights=True)
        check_fingerprint(fingerprint(weights, len(mlps)), base_weights(model), mlps, verify_weights=True)
        with pytest.raises(CheckpointError, match="1 differ, such as norm.weight"):
            check_fingerprint(saved, weights | {"model.norm.weight": torch.full((32,), 7.0)}, mlps, verify_weights=True)


@pytest.mark.parametrize("trained_in", ["float32", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_records_of_the_first_version_hold_to_their_own_rule(family, trained_in, tmp_path):
    model = counted(pico(family))
    mlps, saved = mlps_of(model), FIRST_VERSION[f"{family} {trained_in}"]
    for weights in (base_weights(model), stored(model, tmp_path)):
        check_fingerprint(saved, weights, mlps, verify_weights=True)
    other = counted(pico(family))
    for name, parameter in other.named_parameters():
        if name.endswith(("mlp.gate_proj.weight", "mlp.c_fc.weight")):
            parameter.data += 0.1
    with pytest.raises(CheckpointError, match="other base weights: 100% of the sampled MLP weights"):
        check_fingerprint(saved, base_weights(other), mlps, verify_weights=True)
    with pytest.raises(CheckpointError, match="another base model: its MLP blocks are 2, the model's are 3"):
        check_fingerprint(saved, base_weights(model), [*mlps, mlps[0]], verify_weights=False)


def test_an_adapter_of_the_first_version_loads_and_is_saved_with_the_new_record(tmp_path):
    upcycle(counted(pico())).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["record"]["base_fingerprint"] = FIRST_VERSION["llama float32"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = PeftModel.from_pretrained(counted(pico()), tmp_path)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["record"]["base_fingerprint"]["version"] == 2


@pytest.mark.parametrize(
    "damage", [{}, {"version": 2}, {"version": 2, "blocks": 2, "dtypes": [], "tensors": {"a": "b:x"}}]
)
def test_a_damaged_or_newer_record_is_an_error(damage):
    model, mlps = pico(), mlps_of(pico())
    with pytest.raises(CheckpointError, match=r"damaged|another base model"):
        check_fingerprint(damage, base_weights(model), mlps, verify_weights=True)
    with pytest.raises(CheckpointError, match="has version 3, this package reads up to 2. Update"):
        check_fingerprint({"version": 3}, base_weights(model), mlps, verify_weights=True)


def test_the_record_of_a_large_model_is_short(tmp_path):
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(64, 64) for n in range(100)}
    save_file(tensors, tmp_path / "model.safetensors")
    record = fingerprint(CheckpointReader(tmp_path), 0)
    assert list(record["tensors"]) == ["layers.*.mlp.up_proj.weight 64x64"]
    assert len(json.dumps(record)) < 40 * len(tensors)
