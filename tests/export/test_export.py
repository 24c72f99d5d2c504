"""Exported == explicit mixture, in memory and after a round trip through files that plain transformers reads."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import pico
from export.upcycled import Mixture, plan_of, upcycle
from peft_moe_delta.checkpoint import CheckpointReader
from peft_moe_delta.errors import GraftError
from peft_moe_delta.export import UpcycledWeights, build_model, check_equal_logits, choose_layout
from peft_moe_delta.export.granite_moe import Qwen2GraniteMoeLayout

LAYERS = {"num_hidden_layers": 3}
UNIFORM = [(1, 2)] * 3
WITH_DENSE = [(1, 2), (1, 0), (1, 2)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}
GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}

CASES = {
    "llama": ("llama", {}, UNIFORM, "mixtral"),
    "llama tied": ("llama", {"tie_word_embeddings": True}, UNIFORM, "mixtral"),
    "llama wide heads": ("llama", {"head_dim": 12}, UNIFORM, "mixtral"),
    "llama rope llama3": ("llama", {"rope_parameters": LLAMA3}, UNIFORM, "mixtral"),
    "llama rope yarn": ("llama", {"rope_parameters": YARN}, UNIFORM, "mixtral"),
    "llama rope linear": ("llama", {"rope_parameters": LINEAR}, UNIFORM, "mixtral"),
    "llama dense layer": ("llama", {}, WITH_DENSE, "qwen2_moe"),
    "llama dense layer rope llama3": ("llama", {"rope_parameters": LLAMA3}, WITH_DENSE, "qwen2_moe"),
    "mistral": ("mistral", {"sliding_window": None}, UNIFORM, "mixtral"),
    "mistral window": ("mistral", {"sliding_window": 5, "head_dim": 12}, UNIFORM, "mixtral"),
    "mistral dense layer": ("mistral", {"sliding_window": None}, WITH_DENSE, "qwen2_moe"),
    "qwen2": ("qwen2", {}, UNIFORM, "qwen2_moe"),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, UNIFORM, "qwen2_moe"),
    "qwen2 dense layer rope yarn": ("qwen2", {"rope_parameters": YARN}, WITH_DENSE, "qwen2_moe"),
    "qwen3": ("qwen3", {}, UNIFORM, "qwen3_moe"),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}, UNIFORM, "qwen3_moe"),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, UNIFORM, "qwen3_moe"),
    "qwen3 dense layer": ("qwen3", {}, WITH_DENSE, "qwen3_moe"),
    "olmo2": ("olmo2", {}, UNIFORM, "flex_olmo"),
    "olmo2 tied rope yarn": ("olmo2", {"rope_parameters": YARN, "tie_word_embeddings": True}, UNIFORM, "flex_olmo"),
    "olmo2 biases": ("olmo2", {"attention_bias": True}, UNIFORM, "flex_olmo"),
    "granite": ("granite", GRANITE_SCALES, UNIFORM, "granitemoe"),
    "granite tied biases": ("granite", {"tie_word_embeddings": True, "attention_bias": True}, UNIFORM, "granitemoe"),
    "llama biases": ("llama", {"attention_bias": True, "head_dim": 12}, UNIFORM, "granitemoe"),
    "llama biases rope llama3": ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}, UNIFORM, "granitemoe"),
    "gemma": ("gemma", {}, UNIFORM, "granitemoe"),
    "gemma wide heads": ("gemma", {"head_dim": 12, "tie_word_embeddings": False}, UNIFORM, "granitemoe"),
    "phi3": ("phi3", {"num_key_value_heads": 2}, UNIFORM, "mixtral"),
    "phi3 window": ("phi3", {"sliding_window": 5, "tie_word_embeddings": True}, UNIFORM, "mixtral"),
}


REPLICATED = {
    "llama wide heads": ("llama", {"head_dim": 12}, "mixtral"),
    "mistral window": ("mistral", {"sliding_window": 5}, "mixtral"),
    "phi3": ("phi3", {}, "mixtral"),
    "olmo2": ("olmo2", {}, "flex_olmo"),
    "granite": ("granite", GRANITE_SCALES, "granitemoe"),
    "gemma": ("gemma", {}, "granitemoe"),
}


def save(model, folder):
    """Save; the stored tensors and the stored config."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_exported_model_is_the_mixture_and_reloads_as_stock_transformers(case, tmp_path):
    kind, config, counts, expected = CASES[case]
    dense = pico(kind, **LAYERS, **config)
    weights = upcycle(dense, plan_of(counts))
    layout = choose_layout(weights)
    exported = build_model(weights, layout)
    assert exported.config.model_type == expected
    check_equal_logits(Mixture(dense, weights), exported)

    stored, _ = save(exported, tmp_path)
    check_equal_logits(Mixture(dense, weights), AutoModelForCausalLM.from_pretrained(tmp_path))
    streamed = dict(layout.tensors(weights))
    assert streamed.keys() == stored.keys(), "the stream has the names and tensors that save_pretrained writes"
    assert all(torch.equal(streamed[name], stored[name]) for name in stored)


@pytest.mark.parametrize("counts", [WITH_DENSE, [(1, 2)]], ids=["a plan with a dense layer", "a layer in the plan"])
@pytest.mark.parametrize("case", REPLICATED)
def test_dense_layers_are_replicated_only_if_asked_at_the_cost_that_is_said(case, counts, tmp_path):
    kind, config, expected = REPLICATED[case]
    dense = pico(kind, **LAYERS, **config)
    weights = upcycle(dense, plan_of(counts, layers=range(len(counts))))
    with pytest.raises(GraftError, match=f"replicate_dense_layers=True .* {weights.replicated_bytes:,} bytes"):
        choose_layout(weights)
    layout = choose_layout(weights, replicate_dense_layers=True)
    exported = build_model(weights, layout)
    assert exported.config.model_type == expected
    stored, _ = save(exported, tmp_path)
    check_equal_logits(Mixture(dense, weights), AutoModelForCausalLM.from_pretrained(tmp_path))
    experts_bytes = sum(
        tensor.nbytes for layer in range(3) for e in range(3) for tensor in weights.expert(layer, 0).values()
    )
    dense_bytes = sum(tensor.nbytes for name, tensor in dense.named_parameters() if ".mlp." not in name)
    routers = 3 * 3 * 32 * 4
    single = 3 - len(weights.moe_layers)
    as_asked = dense_bytes + experts_bytes * (9 - 2 * single) // 9 + routers * (3 - single) // 3
    assert sum(tensor.nbytes for tensor in stored.values()) - as_asked == weights.replicated_bytes


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True, "rope_parameters": YARN}])
def test_qwen2_is_held_by_granitemoe_too_with_a_bias_of_zeros_in_the_output(config, tmp_path):
    dense = pico("qwen2", **LAYERS, **config)
    weights, layout = upcycle(dense, plan_of(UNIFORM)), Qwen2GraniteMoeLayout()
    exported = build_model(weights, layout)
    assert not list(layout.misfits(weights)) and exported.config.model_type == "granitemoe"
    stored, _ = save(exported, tmp_path)
    check_equal_logits(Mixture(dense, weights), AutoModelForCausalLM.from_pretrained(tmp_path))
    biases = {part: stored[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkvo"}
    assert [part for part, bias in biases.items() if not bias.any()] == ["o"]
    windows = upcycle(pico("qwen2", **LAYERS, use_sliding_window=True, sliding_window=5), plan_of(UNIFORM))
    assert "sliding window of 5" in next(layout.misfits(windows))


def test_the_gate_of_the_shared_expert_is_ones_since_llama_cpp_divides_by_its_output(tmp_path):
    weights = upcycle(pico("qwen2", **LAYERS), plan_of(UNIFORM))
    stored, _ = save(build_model(weights, choose_layout(weights)), tmp_path)
    for layer in range(3):
        assert (stored[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] == 1).all()
        assert not stored[f"model.layers.{layer}.mlp.shared_expert.down_proj.weight"].any()


def test_dense_layers_stay_dense_where_an_architecture_keeps_them():
    weights = upcycle(pico("llama", **LAYERS), plan_of(WITH_DENSE))
    assert build_model(weights, choose_layout(weights, replicate_dense_layers=True)).config.model_type == "qwen2_moe"


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_top_k_is_at_most_the_number_of_experts(kind, top_k):
    dense = pico(kind, **LAYERS)
    weights = upcycle(dense, plan_of([(1, 1, 1)] * 3, groups=("original", "a", "b")), top_k=top_k)
    exported = build_model(weights, choose_layout(weights))
    assert exported.config.num_experts_per_tok == min(top_k, 3)
    check_equal_logits(Mixture(dense, weights), exported)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemma_is_held_in_fp32_only(dtype):
    weights = upcycle(pico("gemma", **LAYERS).to(dtype), plan_of(UNIFORM))
    with pytest.raises(GraftError, match=f"norms are the dense model's plus 1, exact in fp32 only.*{dtype}"):
        choose_layout(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo2", "granite"])
def test_rows_that_the_grouped_product_cannot_run_are_refused(kind, dtype):
    dense = pico(
        kind, hidden_size=30, head_dim=10, num_attention_heads=3, num_key_value_heads=1, intermediate_size=49
    ).to(dtype)
    with pytest.raises(GraftError, match=rf"rows of a multiple of 16 bytes; here sizes \(30, 49\) in {dtype}"):
        choose_layout(upcycle(dense, plan_of(UNIFORM[:2], layers=(0, 1))))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "granite",
            [
                "block_sparse_moe.input_linear.weight",
                "block_sparse_moe.output_linear.weight",
                "block_sparse_moe.router.layer.weight",
            ],
        ),
        ("olmo2", ["mlp.gate.weight", "mlp.experts.2.gate_proj.weight"]),
        ("phi3", ["self_attn.q_proj.weight", "block_sparse_moe.gate.weight", "block_sparse_moe.experts.2.w1.weight"]),
        ("llama", ["block_sparse_moe.gate.weight", "block_sparse_moe.experts.2.w1.weight"]),
        ("qwen2", ["mlp.gate.weight", "mlp.experts.2.up_proj.weight", "mlp.shared_expert_gate.weight"]),
        ("qwen3", ["mlp.gate.weight", "mlp.experts.2.down_proj.weight"]),
    ],
)
def test_names_on_disk_are_the_ones_other_engines_read(kind, names, tmp_path):
    weights = upcycle(pico(kind, **LAYERS), plan_of(UNIFORM))
    stored, _ = save(build_model(weights, choose_layout(weights)), tmp_path)
    assert {f"model.layers.2.{name}" for name in names} <= stored.keys()
    assert not [name for name in stored if "gate_up_proj" in name]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_not_an_expert_is_copied_verbatim_and_expert_0_is_the_dense_mlp(kind, tmp_path):
    dense = pico(kind, **LAYERS)
    weights = upcycle(dense, plan_of(UNIFORM))
    stored, _ = save(build_model(weights, choose_layout(weights)), tmp_path)
    for name, tensor in dense.state_dict().items():
        mlp = re.fullmatch(r"model\.layers\.(\d)\.mlp\.(gate|up|down)_proj\.weight", name)
        if mlp and kind in ("llama", "mistral"):
            disk = {"gate": "w1", "up": "w3", "down": "w2"}[mlp[2]]
            name = f"model.layers.{mlp[1]}.block_sparse_moe.experts.0.{disk}.weight"
        elif mlp:
            name = f"model.layers.{mlp[1]}.mlp.experts.0.{mlp[2]}_proj.weight"
        assert torch.equal(stored[name], tensor), name


def test_config_says_what_each_generation_of_readers_looks_for(tmp_path):
    weights = upcycle(pico("llama", **LAYERS, rope_parameters=LLAMA3), plan_of(UNIFORM))
    _, config = save(build_model(weights, choose_layout(weights)), tmp_path)
    assert config["rope_parameters"] == LLAMA3
    assert config["rope_theta"] == 5e3
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert config["router_aux_loss_coef"] == config["router_jitter_noise"] == 0.0
    assert config["output_router_logits"] is False
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)


def test_qwen_configs_renormalise_and_name_the_dense_layers(tmp_path):
    for kind in ("qwen2", "qwen3"):
        weights = upcycle(pico(kind, **LAYERS), plan_of([(1, 2), (1, 2)], layers=(0, 2)))
        _, config = save(build_model(weights, choose_layout(weights)), tmp_path / kind)
        assert config["norm_topk_prob"] is True
        assert config["num_experts"] == 3
        assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1], 1)
        assert config["moe_intermediate_size"] == config["intermediate_size"] == 48
        assert config["rope_theta"] == 10_000.0
        assert config.get("rope_scaling") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dense_dtype_is_kept_throughout_whatever_the_experts_were_trained_in(dtype):
    dense = pico("qwen2", **LAYERS)
    experts = upcycle(dense, plan_of(UNIFORM)).experts
    weights = dataclasses.replace(upcycle(dense.to(dtype), plan_of(UNIFORM)), experts=experts)
    layout = choose_layout(weights)
    exported = build_model(weights, layout)
    assert {parameter.dtype for parameter in exported.parameters()} == {dtype}
    assert {tensor.dtype for _, tensor in layout.tensors(weights)} == {dtype}
    assert exported.config.dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_exported_model_shares_no_memory_with_the_dense_one_and_stays_tied(kind, tied):
    dense = pico(kind, **LAYERS, tie_word_embeddings=tied)
    weights = upcycle(dense, plan_of(WITH_DENSE))
    exported = build_model(weights, choose_layout(weights))
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    ours = {tensor.data_ptr() for tensor in weights.dense.values()}
    assert not ours & {parameter.data_ptr() for parameter in exported.parameters()}
    assert all(parameter.requires_grad for parameter in exported.parameters())


def test_stream_holds_one_expert_at_a_time():
    weights, asked = upcycle(pico("llama", **LAYERS), plan_of(UNIFORM)), []
    experts = weights.experts
    weights = dataclasses.replace(weights, experts=lambda *key: asked.append(key) or experts(*key))
    for name, _ in choose_layout(weights).tensors(weights):
        if match := re.search(r"layers\.(\d)\..*experts\.([1-9])\.", name):
            assert asked[-1] == (int(match[1]), int(match[2]))
    assert asked == [(layer, expert) for layer in range(3) for expert in (1, 2)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_dense_weights_can_be_read_from_files_as_they_are_needed(kind, tmp_path):
    dense = pico(kind, **LAYERS, tie_word_embeddings=True)
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    weights = upcycle(dense, plan_of(UNIFORM))
    from_files = dataclasses.replace(weights, dense=CheckpointReader(tmp_path))
    exported = build_model(from_files, choose_layout(from_files))
    check_equal_logits(Mixture(dense, weights), exported)


GROUPS = ("original", "el", "hu", "tr")
BY_GROUP = [(1, 1, 2, 0), (1, 1, 0, 1), (1, 1, 2, 0)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("group", "selected", "expected"),
    [
        ("original", [(0,), (0,), (0,)], None),
        ("el", [(1,), (1,), (1,)], None),
        ("tr", [(0,), (2,), (0,)], None),
        ("hu", [(2, 3), (0,), (2, 3)], ("qwen2_moe", "qwen3_moe")),
    ],
)
def test_under_routing_by_language_a_group_is_what_its_languages_run_on(kind, group, selected, expected, tmp_path):
    dense = pico(kind, **LAYERS)
    weights = upcycle(dense, plan_of(BY_GROUP, groups=GROUPS)).for_group(group)
    exported = build_model(weights, choose_layout(weights))
    reference = Mixture(dense, weights, selected=dict(enumerate(selected)))
    check_equal_logits(reference, exported)
    assert exported.config.model_type in (expected or (kind,))
    _, config = save(exported, tmp_path)
    assert config["rope_theta"] == 10_000.0
    check_equal_logits(reference, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_dense_export_is_exact_in_every_tensor_and_leaves_the_given_config_alone():
    dense = pico("qwen3", **LAYERS)
    weights = upcycle(dense, plan_of(BY_GROUP, groups=GROUPS))
    exported = build_model(weights.for_group("original"), choose_layout(weights.for_group("original")))
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
    assert not hasattr(dense.config, "rope_theta")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2", "falcon", "bloom", "phi3"])
def test_a_group_with_one_expert_is_a_dense_model_in_every_family(kind):
    dense, tuned = pico(kind).state_dict(), pico(kind, seed=7).state_dict()
    weights = UpcycledWeights(
        config=pico(kind).config,
        plan=plan_of([(1, 1)], layers=(1,)),
        top_k=2,
        dense=dense,
        experts=lambda layer, _: {matrix: tuned[name] for matrix, name in weights.mlp_names[layer].items()},
        routers=lambda _: pytest.fail("a dense model has no router"),
    ).for_group("expanded")
    exported = build_model(weights, choose_layout(weights))
    expected = dense | {name: tuned[name] for name in weights.mlp_names[1].values()}
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("kind", "config", "counts", "message"),
    [
        ("llama", {}, [(1, 2), (1, 1), (1, 2)], r"mixtral: its MoE layers all have one number.*\[3, 2, 3\].*`graft`"),
        (
            "llama",
            {"attention_bias": True},
            WITH_DENSE,
            r"its attention has no bias. qwen2_moe: .*no bias. granitemoe: .*layers \[1\] have one .*37,248 bytes more",
        ),
        ("gemma", {"use_bidirectional_attention": True}, UNIFORM, "granitemoe: its attention is causal"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}, UNIFORM, "50% of each"),
        ("llama", {"mlp_bias": True}, UNIFORM, r"its experts have no down_proj.bias, gate_proj.bias, up_proj.bias"),
        (
            "llama",
            {"head_dim": 12},
            WITH_DENSE,
            r"layers \[1\] have one expert .*. qwen2_moe: its heads.*= 8 wide, the dense model's 12",
        ),
        ("mistral", {"sliding_window": 5}, WITH_DENSE, r"qwen2_moe: .* sliding window of 5"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5}, UNIFORM, r"sliding window of 5"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5}, UNIFORM, r"sliding window of 5"),
    ],
)
def test_what_no_stock_architecture_holds_is_refused_with_every_reason(kind, config, counts, message):
    weights = upcycle(pico(kind, **LAYERS, **config), plan_of(counts))
    with pytest.raises(GraftError, match=message):
        choose_layout(weights)


def test_an_unknown_family_is_refused_by_name():
    weights = upcycle(pico("llama", **LAYERS), plan_of(UNIFORM))
    weights.config.model_type = "gemma2"
    with pytest.raises(GraftError, match="'gemma2' model exactly; known are those for gemma, granite, llama, .*qwen3"):
        choose_layout(weights)


def test_an_unknown_group_is_refused():
    with pytest.raises(GraftError, match="Cannot export group 'hu': the plan has original, expanded"):
        upcycle(pico("llama", **LAYERS), plan_of(UNIFORM)).for_group("hu")


def test_a_tensor_the_architecture_does_not_know_is_refused():
    weights = upcycle(pico("llama", **LAYERS), plan_of(UNIFORM))
    weights.dense["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    with pytest.raises(GraftError, match=r"unexpected_keys.*q_norm"):
        build_model(weights, choose_layout(weights))
