"""Deltas between checkpoints: paired by name, read lazily, reported by part, saved and restored."""

import math
from dataclasses import replace

import pytest
import torch

from builders import perturbed, pico
from peft_moe_delta.checkpoint import CheckpointReader, write_safetensors
from peft_moe_delta.errors import CheckpointError, GraftError
from peft_moe_delta.graft.arithmetic import graft_tensor
from peft_moe_delta.graft.delta import PostTrainingDelta
from peft_moe_delta.graft.report import GraftReport

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base():
    return pico("llama")


@pytest.fixture
def post_trained(base):
    return perturbed(base, scale=0.05)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_deltas_are_the_same_from_memory_and_from_files(base, post_trained, tmp_path):
    memory = PostTrainingDelta.from_checkpoints(base.state_dict(), post_trained.state_dict())
    files = PostTrainingDelta.from_checkpoints(
        saved(base, tmp_path / "base"), str(saved(post_trained, tmp_path / "post"))
    )
    assert set(files.names) == set(memory.names) == set(base.state_dict())
    for name, tensor in base.state_dict().items():
        delta = memory.tensor(name)
        assert delta.dtype == torch.float32
        assert torch.equal(delta, (post_trained.state_dict()[name].double() - tensor.double()).float())
        assert torch.equal(files.tensor(name), delta)


def test_opening_two_checkpoints_reads_no_tensor(base, post_trained, tmp_path, monkeypatch):
    folders = saved(base, tmp_path / "base"), saved(post_trained, tmp_path / "post")
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda *_: pytest.fail("read a tensor"))
    PostTrainingDelta.from_checkpoints(*folders)


def test_16_bit_deltas_are_computed_in_fp32(base, post_trained):
    base, post_trained = base.bfloat16().state_dict(), post_trained.bfloat16().state_dict()
    delta = PostTrainingDelta.from_checkpoints(base, post_trained).tensor(Q_PROJ)
    assert torch.equal(delta, post_trained[Q_PROJ].float() - base[Q_PROJ].float())


@pytest.mark.parametrize("with_head", ["base", "post_trained"])
def test_a_tied_head_that_only_one_checkpoint_lists_is_no_difference(with_head, tmp_path):
    base = pico("qwen3", tie_word_embeddings=True)
    post_trained = perturbed(base)
    sides = {"base": saved(base, tmp_path / "base"), "post_trained": saved(post_trained, tmp_path / "post")}
    assert "lm_head.weight" not in CheckpointReader(sides["base"])
    sides[with_head] = {"base": base, "post_trained": post_trained}[with_head].state_dict()
    delta = PostTrainingDelta.from_checkpoints(**sides)
    assert "lm_head.weight" not in delta.names
    assert "model.embed_tokens.weight" in delta.names


def test_an_untied_head_that_only_one_checkpoint_has_is_a_difference(base):
    post_trained = dict(base.state_dict())
    head = post_trained.pop("lm_head.weight")
    assert not torch.equal(head, post_trained["model.embed_tokens.weight"])
    with pytest.raises(GraftError, match=r"Only the base has lm_head.weight; only the post-trained one has nothing"):
        PostTrainingDelta.from_checkpoints(base.state_dict(), post_trained)


def test_different_architectures_are_refused_with_a_few_names(base):
    with pytest.raises(GraftError, match=r"only the post-trained one has .*_norm.weight, .* and \d+ more|q_norm"):
        PostTrainingDelta.from_checkpoints(base.state_dict(), pico("qwen3").state_dict())


def test_different_vocabularies_are_named_as_such(base):
    with pytest.raises(GraftError, match=r"base has 99 tokens, the post-trained model 107.*with their tokenizers"):
        PostTrainingDelta.from_checkpoints(base.state_dict(), pico("llama", vocab_size=107).state_dict())


def test_different_sizes_are_named_by_tensor(base):
    with pytest.raises(GraftError, match=r"Shapes differ, base and post-trained: .*\(48, 32\) and \(64, 32\).*more"):
        PostTrainingDelta.from_checkpoints(base.state_dict(), pico("llama", intermediate_size=64).state_dict())


def test_a_delta_that_is_not_finite_is_refused_by_name(base, post_trained):
    post_trained.state_dict()[Q_PROJ][0, :2] = float("nan")
    delta = PostTrainingDelta.from_checkpoints(base.state_dict(), post_trained.state_dict())
    with pytest.raises(GraftError, match=f"delta of {Q_PROJ} has 2 values that are not finite"):
        delta.tensor(Q_PROJ)


def test_report_sums_norms_by_part():
    base = {
        "model.embed_tokens.weight": torch.tensor([[3.0, 4.0]]),
        "model.layers.0.self_attn.q_proj.weight": torch.tensor([[10.0]]),
        "model.layers.1.self_attn.q_norm.weight": torch.tensor([8.0]),
        "model.layers.0.mlp.up_proj.weight": torch.tensor([[4.0]]),
        "model.layers.1.mlp.up_proj.weight": torch.tensor([[3.0]]),
        "model.layers.0.post_attention_layernorm.weight": torch.tensor([6.0]),
        "lm_head.weight": torch.tensor([[12.0]]),
    }
    post_trained = {name: tensor.clone() for name, tensor in base.items()}
    post_trained["model.layers.0.self_attn.q_proj.weight"] += 1
    post_trained["model.layers.0.mlp.up_proj.weight"] += 3
    post_trained["model.layers.1.mlp.up_proj.weight"] -= 4
    report = PostTrainingDelta.from_checkpoints(base, post_trained).report()
    rows = {row.family: (row.delta_norm, row.weight_norm, row.ratio) for row in report.families}
    assert rows == {
        "embeddings": (0.0, 13.0, 0.0),
        "self_attn": (1.0, 10.0, 0.1),
        "norm": (0.0, 10.0, 0.0),
        "mlp": (5.0, 5.0, 1.0),
    }
    assert [reason[:40] for reason in report.doubtful] == ["mlp: the change is 100% of the weights' "]


def test_a_descendant_is_not_doubtful_and_strangers_and_twins_are(base, post_trained):
    weights = base.state_dict()
    assert PostTrainingDelta.from_checkpoints(weights, post_trained.state_dict()).report().doubtful == ()
    stranger = PostTrainingDelta.from_checkpoints(weights, perturbed(base, scale=3.0).state_dict()).report()
    assert any("self_attn" in reason for reason in stranger.doubtful)
    twin = PostTrainingDelta.from_checkpoints(weights, weights).report()
    assert twin.doubtful == ("the two checkpoints are equal: there is nothing to graft",)


def test_a_report_of_a_graft_is_a_few_lines_in_a_notebook():
    tokens = tuple(f"token {number}" for number in range(1000))
    report = GraftReport("post", 1.0, {"uralic": 0.5}, layout="mixtral", choice="mixtral: exact", new_tokens=tokens)
    report = replace(report, max_logit_difference=1.2e-6, route_agreement=0.987, warnings=("one", "two"))
    assert repr(report).splitlines() == [
        "GraftReport of post as mixtral, scale=1.0, expert_scale={'uralic': 0.5}",
        "  mixtral: exact",
        "  largest logit difference to the adapter: 1e-06",
        "  routes that agree with the adapter's: 98.7%",
        "  doubtful: one (1 more in .warnings)",
    ]
    assert repr(GraftReport("post", 1.0, {})) == "GraftReport of post as an adapter, scale=1.0, expert_scale={}"


def test_zeros_have_a_ratio():
    zeros, ones = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}
    assert PostTrainingDelta.from_checkpoints(zeros, ones).report().families[0].ratio == math.inf
    assert PostTrainingDelta.from_checkpoints(zeros, zeros).report().families[0].ratio == 0


def test_cosine_compares_with_an_experts_own_change(base, post_trained):
    delta = PostTrainingDelta.from_checkpoints(base.state_dict(), post_trained.state_dict())
    own = delta.tensor(Q_PROJ)
    assert delta.cosine(Q_PROJ, 3 * own) == pytest.approx(1)
    assert delta.cosine(Q_PROJ, -own) == pytest.approx(-1)
    assert delta.cosine(Q_PROJ, torch.zeros_like(own)) == 0
    with pytest.raises(GraftError, match=r"has shape \(32, 32\), the expert's \(2,\)"):
        delta.cosine(Q_PROJ, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_delta_restores_the_post_trained_model_over_its_base(base, post_trained, tmp_path, dtype):
    base, post_trained = base.to(dtype).state_dict(), post_trained.to(dtype).state_dict()
    delta = PostTrainingDelta.from_checkpoints(base, post_trained)
    delta.save(tmp_path / "delta.safetensors")
    restored = PostTrainingDelta.load(tmp_path / "delta.safetensors", base)
    assert restored.names == delta.names
    for name, tensor in post_trained.items():
        assert restored.post_trained[name].dtype == dtype
        assert torch.equal(restored.post_trained[name], tensor)
        expert = base[name] + 1
        grafted = graft_tensor(base[name], restored.post_trained[name], expert)
        assert torch.equal(grafted, graft_tensor(base[name], tensor, expert))


def test_a_saved_delta_can_be_small(base, post_trained, tmp_path):
    delta = PostTrainingDelta.from_checkpoints(base.state_dict(), post_trained.state_dict())
    delta.save(tmp_path / "delta.safetensors", dtype=torch.bfloat16)
    assert set(CheckpointReader(tmp_path / "delta.safetensors").dtypes.values()) == {torch.bfloat16}
    restored = PostTrainingDelta.load(tmp_path / "delta.safetensors", base.state_dict())
    torch.testing.assert_close(restored.tensor(Q_PROJ), delta.tensor(Q_PROJ), rtol=1e-2, atol=1e-6)


def test_a_saved_delta_belongs_to_its_base_in_any_wider_dtype(base, post_trained, tmp_path):
    base, post_trained = base.bfloat16(), post_trained.bfloat16()
    file = tmp_path / "delta.safetensors"
    PostTrainingDelta.from_checkpoints(base.state_dict(), post_trained.state_dict()).save(file)
    assert PostTrainingDelta.load(file, base.float().state_dict()).post_trained[Q_PROJ].dtype == torch.bfloat16
    other = PostTrainingDelta.load(file, perturbed(base).state_dict())
    with pytest.raises(GraftError, match=f"computed from another base model: {Q_PROJ} has other values"):
        other.post_trained[Q_PROJ]


def test_files_that_are_no_delta_are_refused(base, tmp_path):
    saved(base, tmp_path)
    with pytest.raises(CheckpointError, match=r"no post-training delta.*from_checkpoints"):
        PostTrainingDelta.load(tmp_path / "model.safetensors", base.state_dict())
    from peft_moe_delta.graft.stored import FORMAT

    write_safetensors(tmp_path / "new.safetensors", {}, {FORMAT: '{"version": 99}'})
    with pytest.raises(CheckpointError, match="of version 99, this package reads version 2"):
        PostTrainingDelta.load(tmp_path / "new.safetensors", base.state_dict())
