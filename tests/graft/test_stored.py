"""Delta files: what comes back, what the file says of its own error, and files that are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from builders import perturbed, pico
from peft_moe_delta.errors import CheckpointError, GraftError
from peft_moe_delta.graft.delta import PostTrainingDelta
from peft_moe_delta.graft.rows import VocabularyMap
from peft_moe_delta.graft.stored import DeltaFile, combine_deltas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(seed, dtype=torch.float32):
    model = pico(seed=0) if seed == 0 else perturbed(pico(seed=0), seed=seed)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def hard(dtype):
    """Weights whose delta cannot be summed back: they shrank to almost nothing, changed sign, or are a minus zero."""
    base = torch.tensor([1.0, 1.0, -3.0, 0.0, 1e-3, 2.0, 0.1], dtype=torch.float64)
    post = torch.tensor([1e-6, -1.0, 3e-5, -0.0, 1e3, 2.0, 0.1], dtype=torch.float64)
    return {"a.weight": base.to(dtype)}, {"a.weight": (post * 1.2345).to(dtype)}


def bits(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def reloaded(base, post, path, **options):
    PostTrainingDelta.from_checkpoints(base, post).save(path, **options)
    return PostTrainingDelta.load(path, base).post_trained


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", [lambda dtype: (weights(0, dtype), weights(1, dtype)), hard])
def test_fp32_brings_back_every_bit(pair, dtype, tmp_path):
    base, post = pair(dtype)
    found = reloaded(base, post, tmp_path / "delta.safetensors")
    for name, tensor in post.items():
        assert torch.equal(bits(found[name]), bits(tensor)), name
    stored = DeltaFile.open(tmp_path / "delta.safetensors").tensors
    assert not any(tensor.differing for tensor in stored.values())


def test_corrections_are_needed_and_few(tmp_path):
    base, post = hard(torch.bfloat16)
    reloaded(base, post, tmp_path / "hard.safetensors")
    assert 0 < DeltaFile.open(tmp_path / "hard.safetensors").tensors["a.weight"].corrected < 4
    reloaded(weights(0), weights(1), tmp_path / "model.safetensors")
    tensors = DeltaFile.open(tmp_path / "model.safetensors").tensors.values()
    shares = sum(tensor.corrected for tensor in tensors) / sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    assert shares < 0.2


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"rank": 2}, {"dtype": torch.bfloat16, "rank": 2}])
def test_the_error_is_what_the_file_says(options, tmp_path):
    base, post = weights(0), weights(1)
    found = reloaded(base, post, tmp_path / "delta.safetensors", **options)
    file = DeltaFile.open(tmp_path / "delta.safetensors")
    for name, stored in file.tensors.items():
        exact = post[name].double() - base[name].double()
        error = (file.delta(name).double() - exact).square().sum().item()
        assert stored.error == pytest.approx(error, rel=1e-6)
        assert stored.delta == pytest.approx(exact.square().sum().item())
        assert stored.differing == int((found[name] != post[name]).sum())
    assert any(stored.differing for stored in file.tensors.values())


def test_low_rank_is_the_best_of_its_rank_and_full_rank_is_exact(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(24, 20, generator=generator, dtype=torch.float64).float()}
    change = torch.randn(24, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    post = {"a.weight": base["a.weight"] + change}
    reloaded(base, post, tmp_path / "two.safetensors", rank=2)
    assert DeltaFile.open(tmp_path / "two.safetensors").tensors["a.weight"].error < 1e-9
    reloaded(base, post, tmp_path / "one.safetensors", rank=1)
    stored = DeltaFile.open(tmp_path / "one.safetensors").tensors["a.weight"]
    values = torch.linalg.svdvals((post["a.weight"] - base["a.weight"]).double())
    assert stored.error == pytest.approx(values[1:].square().sum().item(), rel=1e-4)
    assert stored.rank == 1


def test_a_large_matrix_is_factored_nearly_as_well(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.zeros(120, 100)}
    post = {"a.weight": torch.randn(120, 100, generator=generator) * torch.logspace(0, -3, 100)}
    reloaded(base, post, tmp_path / "delta.safetensors", rank=8)
    best = torch.linalg.svdvals(post["a.weight"].double())[8:].square().sum().item()
    found = DeltaFile.open(tmp_path / "delta.safetensors").tensors["a.weight"].error
    assert best <= found * (1 + 1e-6) and found < 1.02 * best


def test_another_vocabulary_comes_along(tmp_path):
    base = {"embed_tokens.weight": torch.randn(4, 3), "norm.weight": torch.ones(3)}
    post = {"embed_tokens.weight": torch.randn(6, 3), "norm.weight": torch.zeros(3)}
    vocabulary = VocabularyMap(torch.tensor([1, 0, -1, 3, -1, 2]), 6)
    delta = PostTrainingDelta.from_checkpoints(base, post, vocabulary)
    delta.save(tmp_path / "delta.safetensors")
    again = PostTrainingDelta.load(tmp_path / "delta.safetensors", base)
    for name in post:
        assert torch.equal(again.post_trained[name], post[name])
        assert torch.equal(again.tensor(name), delta.tensor(name))
    assert again.base.vocabulary.next_id == 6


def test_deltas_combine_with_weights(tmp_path):
    base, first, second = weights(0), weights(1), weights(2)
    for name, post in (("first", first), ("second", second)):
        PostTrainingDelta.from_checkpoints(base, post).save(tmp_path / name)
    combine_deltas([(tmp_path / "first", 0.75), (tmp_path / "second", -0.5)], tmp_path / "both", torch.float32)
    found = PostTrainingDelta.load(tmp_path / "both", base)
    for name in base:
        expected = base[name] + 0.75 * (first[name] - base[name]) - 0.5 * (second[name] - base[name])
        torch.testing.assert_close(found.post_trained[name], expected, atol=1e-6, rtol=1e-5)
    PostTrainingDelta.from_checkpoints(weights(3), first).save(tmp_path / "other")
    with pytest.raises(GraftError, match="not deltas of one base"):
        combine_deltas([(tmp_path / "first", 1.0), (tmp_path / "other", 1.0)], tmp_path / "x", torch.float32)
    assert not (tmp_path / "x").exists()


def test_the_file_is_plain_safetensors(tmp_path):
    reloaded(weights(0, torch.bfloat16), weights(1, torch.bfloat16), tmp_path / "delta.safetensors")
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.float32


def test_a_failed_save_leaves_nothing(tmp_path):
    base, post = weights(0), weights(1)
    post["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    with pytest.raises(GraftError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        PostTrainingDelta.from_checkpoints(base, post).save(tmp_path / "delta.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "delta.safetensors"
    reloaded(weights(0), weights(1), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        DeltaFile.open(path)
