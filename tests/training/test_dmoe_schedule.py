"""DMoE's schedule (arXiv 2506.12388): hard by group with the group classification loss, then soft top-2.

Both are the expansion stage: `start_expansion(routing="language", language_prior_coef=1.28)` sends every token to its
group's experts while the routers learn to tell the groups; `start_expansion(routing="learned")` lets them choose.
"""

import torch

from builders import LANGUAGES, alike, logits, pico, token_batch, upcycle
from chance import shifted
from training.common import expert_model, parameters

IDS = torch.arange(len(LANGUAGES))
GROUPS = torch.tensor([1, 0, 1, 2])  # of hu, en, fi, az; each owns the expert of its index
EXPERTS = {"uralic": 1, "turkic": 1}
CLASSIFICATION = 1.28


def batch_of(generator):
    """Tokens that tell their language: four of their own for each."""
    tokens = 3 + 4 * IDS[:, None] + torch.randint(4, (4, 10), generator=generator)
    return {"input_ids": tokens, "labels": tokens, "language_ids": IDS}


def steps(model, number, rate=0.02):
    """Trains; returns the last step's figures."""
    generator = torch.Generator().manual_seed(shifted(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    context = next(iter(model.layers().values())).context
    for _ in range(number):
        context.read_statistics()
        optimizer.zero_grad()
        model.train()(**batch_of(generator)).loss.backward()
        optimizer.step()
    return context.read_statistics()


def test_hard_by_group_then_soft(holds):
    base = alike(pico(), *(range(3 + 4 * i, 7 + 4 * i) for i in range(len(IDS))))
    model = upcycle(base, routing="language", top_k=None, experts=EXPERTS).train()
    model.start_expansion(routing="language", language_prior_coef=CLASSIFICATION)
    before = parameters(model)
    figures = steps(model, 60)
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert any("moe_delta_router" in name for name in changed) and any("moe_delta_experts" in name for name in changed)
    holds(figures["language_prior_loss"], below=0.1, name="how well the routers know the groups")
    assert "load_balancing_loss" not in figures, "a single expert a group leaves nothing to balance"

    by_language = {code: logits(model.eval(), token_batch(), language=code) for code in LANGUAGES}
    assert torch.equal(by_language["hu"], by_language["fi"])
    assert not torch.equal(by_language["hu"], by_language["az"])

    model.start_expansion(routing="learned")
    config = model.active_peft_config
    assert (config.experts_per_token, config.language_prior, config.load_balancing) == (2, 0.0, 0.01)
    with torch.no_grad():
        chosen = best_experts(model, batch_of(torch.Generator().manual_seed(shifted(1)))["input_ids"])
    for index, layer in enumerate(chosen):  # what was hard-wired is now what the router chooses
        holds((layer == GROUPS[:, None]).float().mean(), above=0.95, name=f"layer {index}")
    figures = steps(model, 3, rate=1e-3)
    assert figures["load_balancing_loss"] > 0


def best_experts(model, tokens):
    """Each layer's first choice for every token, (B, S)."""
    seen = []
    hooks = [
        layer.router("default").register_forward_hook(lambda *args: seen.append(args[-1].argmax(-1)))
        for layer in model.layers().values()
    ]
    model.eval()(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return [choice.view(tokens.shape) for choice in seen]


def test_a_batch_may_mix_groups():
    """The published code sends a whole batch to its most common group; here each token goes to its own."""
    model = expert_model(routing="language", experts=EXPERTS, top_k=1).eval()
    tokens = token_batch(4)
    mixed = logits(model, tokens, language_ids=IDS)
    for row, code in enumerate(LANGUAGES):
        alone = logits(model, tokens[row : row + 1], language=code)
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-4, rtol=0)
