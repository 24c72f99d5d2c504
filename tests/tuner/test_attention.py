"""Attention experts: a soft mixture that changes nothing untrained, and that the cache remembers exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from builders import LANGUAGES, logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta.errors import ArchitectureError, GraftError, LanguageError, PlanError
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.tuner.attention import MoeDeltaAttention
from training.common import checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "cohere", "granite", "olmo2", "smollm3")
PUBLISHED = ("llama", "mistral", "qwen2", "qwen3", "cohere")
VARIANTS = pytest.mark.parametrize("variant", ["shared_kv", "full"])
ROUTINGS = pytest.mark.parametrize("routing", ["learned", "language"])
WINDOWS = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "cohere": {"use_qk_norm": True},
}
TOKENS = token_batch()
IDS = torch.tensor([0, 1, 3])
CLOSE = {"atol": 5e-5, "rtol": 0}


def model_of(family="llama", variant="full", **changes):
    base = pico(family, **WINDOWS.get(family, {}))
    return upcycle(base, **{"attention_experts": variant, "trained": True, **changes})


def attentions(model):
    return [layer for layer in moe_layers(model) if isinstance(layer, MoeDeltaAttention)]


# -- what the mixture is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "low-rank"])
@ROUTINGS
@VARIANTS
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_experts_change_nothing(family, variant, routing, rank):
    base = pico(family, **WINDOWS.get(family, {}))
    expected = logits(base, TOKENS)
    model = upcycle(base, attention_experts=variant, routing=routing, expert_rank=rank)
    assert len(attentions(model)) == 2
    torch.testing.assert_close(logits(model, TOKENS, language_ids=IDS), expected, **CLOSE)


@VARIANTS
@pytest.mark.parametrize("family", PUBLISHED)
def test_the_output_is_the_weighted_sum_of_whole_attention_modules(family, variant):
    """Each expert stands alone in a copy of the base's module; weights come after its output projection."""
    model = model_of(family, variant)
    plain = pico(family, **WINDOWS.get(family, {}))
    layer, seen = attentions(model)[0], {}
    layer.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True)
    logits(model, TOKENS, use_cache=False)
    out, x = seen.pop("out"), seen["hidden_states"]
    weights = F.softmax(x @ layer.moe_delta_router["default"].weight.T, dim=-1)
    expected = 0
    for e, expert in enumerate(layer.experts("default")):
        alone = copy.deepcopy(plain.model.layers[0].self_attn)
        alone.load_state_dict(expert.state_dict(), strict=False)
        with torch.no_grad():
            expected = expected + weights[..., e, None] * alone(**seen)[0]
    torch.testing.assert_close(out, expected, **CLOSE)


def test_shared_experts_own_no_keys_and_values():
    own = {name for name, _ in attentions(model_of("qwen3", "shared_kv"))[0].experts("default")[1].named_parameters()}
    assert own == {"q_proj.weight", "o_proj.weight", "q_norm.weight"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@VARIANTS
def test_experts_follow_the_hosts_attention_implementation(variant, implementation):
    model = model_of("mistral", variant)
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in (7, 4, 2)])
    expected = logits(model, TOKENS, attention_mask=mask)
    model.base_model.model.set_attn_implementation(implementation)
    assert all(e.config._attn_implementation == implementation for e in attentions(model)[1].experts("default"))
    shown = mask.bool()
    torch.testing.assert_close(logits(model, TOKENS, attention_mask=mask)[shown], expected[shown], **CLOSE)


@VARIANTS
def test_fp32_experts_run_over_a_16_bit_host(variant):
    base = pico().bfloat16()
    model = upcycle(copy.deepcopy(base), attention_experts=variant)
    assert attentions(model)[0].experts("default")[1].q_proj.weight.dtype == torch.float32
    for implementation in ("sdpa", "eager"):
        model.base_model.model.set_attn_implementation(implementation)
        base.set_attn_implementation(implementation)
        torch.testing.assert_close(logits(model, TOKENS), logits(base, TOKENS), atol=0.1, rtol=0.05)
    new = model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=3)
    assert new.shape == (3, 10)


def test_rows_of_a_mixed_batch_do_not_touch_each_other():
    model = model_of(routing="language")
    together = logits(model, TOKENS, language_ids=IDS)
    for row, code in enumerate(("hu", "en", "az")):
        torch.testing.assert_close(
            together[row : row + 1], logits(model, TOKENS[row : row + 1], language=code), **CLOSE
        )


# -- the cache --------------------------------------------------------------------------------------------------------


def step_by_step(model, tokens, mask, cache, **arguments):
    """Logits of every position, from a prompt of 3 tokens and then one token at a time."""
    found = []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start, end in [(0, 3), *((i, i + 1) for i in range(3, tokens.shape[1]))]:
        with torch.no_grad():
            output = model(
                input_ids=tokens[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
                **arguments,
            )
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1), cache


CACHES = {
    "default": lambda config: None,
    "without config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config, max_cache_len=9),
}


@ROUTINGS
@VARIANTS
@pytest.mark.parametrize(
    ("family", "cache"),
    [*((family, "default") for family in PUBLISHED), ("mistral", "without config"), ("mistral", "static")],
)
def test_token_by_token_equals_one_pass_with_left_padding(family, variant, routing, cache):
    model = model_of(family, variant, routing=routing)
    tokens = token_batch(length=9)
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in (9, 7, 6)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, tokens, attention_mask=mask, position_ids=positions, language_ids=IDS, use_cache=False)
    empty = CACHES[cache](model.base_model.model.config)
    found, _ = step_by_step(model, tokens, mask, empty, language_ids=IDS)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@ROUTINGS
@VARIANTS
def test_beams_and_greedy_generation_equal_recomputing(variant, routing):
    model = model_of("mistral", variant, routing=routing)
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in (7, 4, 2)])
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        cached, recomputed = (
            model.generate(input_ids=TOKENS * mask, language_ids=IDS, num_beams=beams, use_cache=cache, **options)
            for cache in (True, False)
        )
        assert torch.equal(cached, recomputed)


def test_a_cache_has_one_layer_for_shared_keys_and_one_an_expert_for_own():
    sizes = {}
    for variant in ("shared_kv", "full"):
        _, cache = step_by_step(model_of("llama", variant), TOKENS, torch.ones_like(TOKENS), None)
        sizes[variant] = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert cache.get_seq_length() == 7
    assert sizes == {"shared_kv": 2 * 2 * 3 * 2 * 7 * 8, "full": 4 * sizes["shared_kv"]}  # layers, k and v, B, heads, S


def test_one_language_alone_keeps_one_cache():
    model = model_of(routing="language", experts={"uralic": 1, "turkic": 1})
    _, cache = step_by_step(model, TOKENS, torch.ones_like(TOKENS), None, language="hu")
    assert len(cache.layers) == 2
    with pytest.raises(LanguageError, match="lack the text so far.*shared_kv"):
        model(TOKENS[:, :1], past_key_values=cache, language="az")
    shared = model_of(variant="shared_kv", routing="language")
    _, cache = step_by_step(shared, TOKENS, torch.ones_like(TOKENS), None, language="hu")
    assert shared(TOKENS[:, :1], past_key_values=cache, language="az").logits.isfinite().all()


def test_a_prompt_of_several_languages_goes_on_in_its_last():
    model = model_of(routing="language")
    tokens, ids = token_batch(batch=1), torch.tensor([[1, 1, 1, 3, 3, 3, 3]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached = model.generate(input_ids=tokens, language_ids=ids, **options)
    following = logits(model, cached, language_ids=torch.tensor([[1, 1, 1] + [3] * 8]))[0, 6:-1]
    following[:, 2] = -torch.inf
    assert torch.equal(cached[0, 7:], following.argmax(-1))


def test_a_cache_that_was_begun_without_attention_experts_is_refused():
    model = model_of()
    with model.disable_adapter():
        cache = model(TOKENS).past_key_values
    with pytest.raises(ArchitectureError, match="Begin generation with an empty cache"):
        model(TOKENS[:, :1], past_key_values=cache)


# -- training ---------------------------------------------------------------------------------------------------------


@VARIANTS
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    def gradients(checkpointing):
        model = model_of("qwen3", variant, language_prior_coef=0.5, router_z_loss_coef=0.1).train()
        if checkpointing:
            checkpoint(model.base_model.model, use_reentrant=False)
            model.enable_input_require_grads()
        loss = model(TOKENS, labels=TOKENS, language_ids=IDS).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    (loss, plain), (same, checkpointed) = gradients(False), gradients(True)
    assert loss == same
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    assert all("moe_delta_" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, **CLOSE)


def test_soft_routers_are_not_balanced_but_get_prior_and_z_loss():
    targets = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool).repeat_interleave(7, dim=0)
    alone = {
        "load_balancing_coef": lambda logits: (
            4 * (F.one_hot(logits.topk(2)[1], 4).sum(1) / 2).mean(0) @ logits.softmax(-1).mean(0)
        ),
        "language_prior_coef": lambda logits: -(logits.softmax(-1) * targets).sum(-1).log().mean(),
        "router_z_loss_coef": lambda logits: logits.logsumexp(-1).square().mean(),
    }
    for name, loss_of in alone.items():
        losses = []
        for coefficient in (0.0, 1.0):
            model = model_of(**{**dict.fromkeys(alone, 0.0), name: coefficient}).train()
            soft, hard = [], []
            for layer in moe_layers(model):
                kept = soft if isinstance(layer, MoeDeltaAttention) else hard
                layer.moe_delta_router["default"].register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            losses.append(model(TOKENS, labels=TOKENS, language_ids=IDS).loss)
        routers = hard if name == "load_balancing_coef" else soft + hard
        assert len(routers) == (2 if name == "load_balancing_coef" else 4)
        # The mean over all routers that have the loss: a block with two of them does not count twice.
        mean = sum(map(loss_of, routers)) / len(routers)
        torch.testing.assert_close(losses[1] - losses[0], mean, atol=1e-5, rtol=1e-5)


def test_review_trains_attention_routers_too():
    model = model_of()
    model.start_review()
    trained = {n.split("moe_delta_")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"router"}
    assert sum(p.requires_grad for layer in attentions(model) for p in layer.parameters()) == 2


# -- the adapter's life -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "low-rank"])
@VARIANTS
def test_save_and_load_disable_and_unload(variant, rank, tmp_path):
    base = pico("qwen3")
    plain = copy.deepcopy(base)
    model = upcycle(base, trained=True, attention_experts=variant, expert_rank=rank)
    expected = logits(model, TOKENS)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path), TOKENS), expected)
    assert torch.equal(logits(copy.deepcopy(model), TOKENS), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, TOKENS), logits(plain, TOKENS))
    assert torch.equal(logits(model.unload(), TOKENS), logits(plain, TOKENS))
    assert not attentions(base)


def test_an_adapter_without_attention_experts_stands_beside_one_with():
    model = model_of()
    expected = logits(model, TOKENS)
    config = copy.deepcopy(model.peft_config["default"])
    config.change(attention_experts=None, base_fingerprint=None)
    model.add_adapter("mlp", config)
    model.set_adapter("mlp")
    torch.testing.assert_close(logits(model, TOKENS), logits(pico(), TOKENS), **CLOSE)
    model.set_adapter("default")
    assert torch.equal(logits(model, TOKENS), expected)


@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "low-rank"])
@VARIANTS
@pytest.mark.parametrize("family", PUBLISHED)
def test_grafting_gives_each_attention_expert_the_delta(family, variant, rank):
    base = pico(family)
    post = perturbed(base)
    untrained = upcycle(copy.deepcopy(base), attention_experts=variant, expert_rank=rank).graft(copy.deepcopy(post))
    torch.testing.assert_close(logits(untrained, TOKENS), logits(post, TOKENS), **CLOSE)
    model = upcycle(base, trained=True, attention_experts=variant, routing="language", expert_rank=rank)
    expected, parameters = copy.deepcopy(post), dict(post.named_parameters())
    with torch.no_grad():
        for _, name, layer in model.base_model.expert_layers():
            trained = layer.expert_weights("default", 3)
            for key, start in layer.base_layer.named_parameters():
                grafted = trained[key].double() - start.double() + parameters[f"{name}.{key}"].double()
                expected.get_parameter(f"{name}.{key}").copy_(grafted)
    grafted = model.graft(post)
    torch.testing.assert_close(logits(grafted, TOKENS, language="az"), logits(expected, TOKENS), **CLOSE)
    torch.testing.assert_close(logits(to_stock(grafted, language="az"), TOKENS), logits(expected, TOKENS), **CLOSE)
    with pytest.raises(GraftError, match="no attention experts|No stock MoE architecture"):
        to_stock(grafted, language="hu")


def test_unknown_attention_is_refused_before_anything_changes():
    for family in ("gpt2", "gpt_neox"):
        base = pico(family)
        with pytest.raises(ArchitectureError, match=f"not known to work in '{family}' models, only in: llama"):
            upcycle(base, attention_experts="full")
        assert moe_layers(base) == []
    with pytest.raises(PlanError, match="attention_experts='half'.*shared_kv, full"):
        upcycle(pico(), attention_experts="half")


# -- raw top-1 weights ------------------------------------------------------------------------------------------------


def test_raw_top_1_weights_scale_the_expert_by_its_probability():
    model = upcycle(pico(), trained=True, top_k=1, norm_topk_prob=False)
    layer, seen = moe_layers(model)[0], {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    logits(model, TOKENS)
    probabilities, chosen = F.softmax(seen["x"] @ layer.moe_delta_router["default"].weight.T, -1).max(-1, keepdim=True)
    outputs = torch.stack([expert(seen["x"]) for expert in layer.experts("default")], dim=-2)
    picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, outputs.shape[-1]))[..., 0, :]
    torch.testing.assert_close(seen["y"], probabilities * picked, **CLOSE)
    with pytest.raises(GraftError, match="norm_topk_prob=False"):
        to_stock(model)


@pytest.mark.parametrize("kind", ["full", "shared_kv"])
def test_a_batch_of_languages_with_one_expert_each_equals_each_language_alone(kind):
    one = {"uralic": 1, "turkic": 1}
    model = upcycle(pico(), trained=True, attention_experts=kind, routing="language", experts=one, top_k=1)
    tokens = token_batch(batch=4)
    mixed = logits(model, tokens, language_ids=torch.arange(4))
    for row, code in enumerate(LANGUAGES):
        alone = logits(model, tokens[row : row + 1], language=code)
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=5e-5, rtol=0)
