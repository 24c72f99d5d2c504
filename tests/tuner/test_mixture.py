"""What an upcycled layer computes, token by token: against an explicit mixture, and who may not influence whom."""

import copy

import pytest
import torch
from torch.func import functional_call

from builders import EXPERTS, LANGUAGES, logits, moe_layers, pico, token_batch, upcycle

UNEVEN = {"uralic": [2, 1, 0], "turkic": [1, 0, 0]}  # layer by layer: 0 | 1 2 | 3, then 0 | 1, then a dense layer
CODES = list(LANGUAGES)
IDS = torch.tensor([0, 1, 3])


def observed(model, tokens, **arguments):
    """(layer, its input rows, its output rows) of each upcycled layer in one pass."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs, output)))
        for layer in moe_layers(model)
    ]
    logits(model, tokens, **arguments)
    for hook in hooks:
        hook.remove()
    return seen


def explicit_mixture(layer, inputs, allowed, top_k):
    """`y_t = sum_j w_tj Expert_j(x_t)` by a loop over tokens and their experts in fp64."""
    x_TD = inputs[0].double().flatten(0, -2)
    residual_TD = inputs[1].double().flatten(0, -2) if len(inputs) > 1 else None
    mlp = copy.deepcopy(layer.base_layer).double()
    router = layer.moe_delta_router["default"].weight.double()
    rows = []
    for token, x in enumerate(x_TD):
        usable = allowed[token]
        p = (router @ x)[usable].softmax(-1)
        best = p.argsort(descending=True)[:top_k]
        y = torch.zeros_like(x)
        for j in best:
            weights = {name: w.double() for name, w in layer.expert_weights("default", usable[j]).items()}
            arguments = (x[None],) if residual_TD is None else (x[None], torch.zeros_like(x)[None])
            y += p[j] / p[best].sum() * functional_call(mlp, weights, arguments)[0]
        rows.append(y if residual_TD is None else residual_TD[token] + y)
    return torch.stack(rows).detach()


def allowed_experts(layer, routing, codes):
    """The experts that each token may use, one list a token, counted out by hand."""
    _, uralic, turkic = layer.settings["default"].counts
    everyone = [0, *range(1, 1 + uralic + turkic)]
    owned = {"original": [0], "uralic": everyone[1 : 1 + uralic], "turkic": everyone[1 + uralic :]}
    return [everyone if routing == "learned" else owned[LANGUAGES[code]] or [0] for code in codes]


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
@pytest.mark.parametrize("experts", [EXPERTS, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("family", "routing", "top_k"),
    [
        ("llama", "learned", 1),
        ("llama", "learned", 2),
        ("llama", "learned", 3),
        ("llama", "language", 1),
        ("llama", "language", 2),
        ("bloom", "learned", 2),
        ("gpt2", "language", 2),
    ],
)
def test_layer_equals_the_explicit_mixture(family, routing, top_k, experts, rank):
    model = upcycle(
        pico(family, num_hidden_layers=3), trained=True, routing=routing, experts=experts, expert_rank=rank, top_k=top_k
    )
    ids = torch.randint(0, 4, (3, 7))
    layers = observed(model, token_batch(), language_ids=ids)
    assert len(layers) == (3 if experts is EXPERTS else 2), "a layer without experts stays the model's own"
    for layer, inputs, output in layers:
        allowed = allowed_experts(layer, routing, [CODES[i] for i in ids.flatten()])
        expected = explicit_mixture(layer, inputs, allowed, top_k)
        torch.testing.assert_close(output.double().flatten(0, -2), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_a_single_choice_is_that_experts_output_unscaled(routing):
    model = upcycle(pico(), trained=True, routing=routing, experts={"uralic": 1, "turkic": 1}, top_k=1)
    for layer, (x,), output in observed(model, token_batch(), language_ids=IDS):
        alone = torch.stack([expert(x) for expert in layer.experts("default")])
        distance = (alone - output).abs().amax(dim=-1).amin(dim=0)
        assert distance.max() < 1e-5


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_a_hard_routed_batch_equals_each_language_alone(rank):
    model = upcycle(pico(), trained=True, routing="language", expert_rank=rank)
    tokens = token_batch(batch=4)
    mixed = logits(model, tokens, language_ids=torch.arange(4))
    for row, code in enumerate(CODES):
        alone = logits(model, tokens[row : row + 1], language=code)
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=5e-5, rtol=0)
        other = logits(model, tokens[row : row + 1], language=CODES[row - 1])
        assert (alone - other).abs().max() > 0.1 or LANGUAGES[code] == LANGUAGES[CODES[row - 1]], "languages do matter"


def test_languages_are_named_in_five_ways():
    model = upcycle(pico(), trained=True, routing="language")
    tokens = token_batch(batch=4)
    expected = logits(model, tokens, language_ids=torch.arange(4))
    per_token = torch.arange(4)[:, None].expand(4, 7)
    assert torch.equal(logits(model, tokens, language_ids=per_token), expected)
    assert torch.equal(logits(model, tokens, language=CODES), expected)
    whole = logits(model, tokens, language="az")
    assert torch.equal(logits(model, tokens, language_ids=torch.full((4,), 3)), whole)
    model.set_language("az")
    assert torch.equal(logits(model, tokens), whole)
    assert torch.equal(logits(model, tokens, language_ids=torch.arange(4)), expected), "a call overrides the default"


def test_languages_may_change_inside_a_row():
    model = upcycle(pico(), trained=True, routing="language")
    tokens = token_batch(batch=1)
    half = logits(model, tokens, language_ids=torch.tensor([[1, 1, 1, 3, 3, 3, 3]]))
    english, azeri = (logits(model, tokens, language=code) for code in ("en", "az"))
    torch.testing.assert_close(half[:, :3], english[:, :3], atol=5e-5, rtol=0)
    assert (half[:, 3:] - azeri[:, 3:]).abs().max() > 0.1, "the later tokens attend to the English ones"
    assert (half[:, 3:] - english[:, 3:]).abs().max() > 0.1


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_original_languages_routed_by_language_are_the_base_model(rank):
    base = pico()
    expected = logits(base, token_batch())
    model = upcycle(base, trained=True, routing="language", expert_rank=rank)
    assert torch.equal(logits(model, token_batch(), language="en"), expected)
    mixed = logits(model, token_batch(), language_ids=torch.tensor([0, 1, 3]))
    torch.testing.assert_close(mixed[1], expected[1], atol=5e-5, rtol=0)


def test_a_group_without_experts_in_a_layer_runs_on_the_base_mlp_there():
    model = upcycle(pico(num_hidden_layers=3), trained=True, routing="language", experts=UNEVEN)
    seen = observed(model, token_batch(), language="az")  # Turkic owns an expert in the first layer alone
    assert [torch.equal(output, layer.base_layer(x)) for layer, (x,), output in seen] == [False, True]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ids", ["sequence", "token"])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_padding_changes_nothing_for_real_tokens(routing, ids, side):
    model = upcycle(pico(), trained=True, routing=routing)
    tokens = token_batch()
    expected = logits(model, tokens, language_ids=IDS)
    filler = torch.randint(3, 99, (3, 4))
    order = (filler, tokens) if side == "left" else (tokens, filler)
    real = torch.cat([torch.ones_like(part) if part is tokens else torch.zeros_like(part) for part in order], dim=1)
    per_token = torch.where(real == 1, IDS[:, None], -100)
    padded = logits(
        model,
        torch.cat(order, dim=1),
        attention_mask=real,
        position_ids=(real.cumsum(1) - 1).clamp(min=0),
        language_ids=IDS if ids == "sequence" else per_token,
    )
    torch.testing.assert_close(padded[real == 1].view_as(expected), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_a_disabled_adapter_is_the_base_model_bit_for_bit(routing, rank):
    base = pico()
    expected = logits(base, token_batch())
    model = upcycle(base, trained=True, routing=routing, expert_rank=rank)
    trained = logits(model, token_batch(), language="hu")
    with model.disable_adapter():
        assert torch.equal(logits(model, token_batch()), expected)
        assert torch.equal(logits(model, token_batch(), language="hu"), expected)
    assert torch.equal(logits(model, token_batch(), language="hu"), trained)
    assert not torch.equal(trained, expected)


@pytest.mark.parametrize("stage", ["expansion", "review"])
def test_experts_expanded_by_language_become_a_learned_mixture(stage):
    model = upcycle(pico(), trained=True, routing="language")
    expected = logits(upcycle(pico(), trained=True, routing="learned"), token_batch())
    getattr(model, f"start_{stage}")(routing="learned")
    assert torch.equal(logits(model, token_batch()), expected)


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_the_bare_backbone_runs_in_the_default_language(routing):
    model = upcycle(pico(), trained=True, routing=routing)
    model.set_language("hu")
    causal_lm = model.get_base_model()
    with torch.no_grad():
        hidden = causal_lm.model(input_ids=token_batch()).last_hidden_state
        torch.testing.assert_close(causal_lm.lm_head(hidden), logits(model, token_batch()))
