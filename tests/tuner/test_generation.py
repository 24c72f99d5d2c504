"""Generation: what the cache remembers equals what a full pass recomputes, whoever shares the batch."""

import pytest
import torch

from builders import logits, pico, token_batch, upcycle

IDS = torch.tensor([0, 1, 3])
ROUTINGS = pytest.mark.parametrize("routing", ["learned", "language"])
NEW_TOKENS = 6


def generate(model, tokens, mask=None, **options):
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(input_ids=tokens, attention_mask=mask, **options)


@ROUTINGS
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_cached_equals_recomputed(family, routing):
    model = upcycle(pico(family), trained=True, routing=routing)
    tokens = token_batch()
    for _ in range(NEW_TOKENS):
        following = logits(model, tokens, language_ids=IDS)[:, -1]
        following[:, 2] = -torch.inf  # as min_new_tokens keeps the end away
        tokens = torch.cat([tokens, following.argmax(-1, keepdim=True)], dim=1)
    for cache in (True, False):
        assert torch.equal(generate(model, token_batch(), language_ids=IDS, use_cache=cache), tokens)


@ROUTINGS
def test_beams_equal_each_row_alone(routing):
    model = upcycle(pico(), trained=True, routing=routing)
    together = generate(model, token_batch(), language_ids=IDS, num_beams=3)
    uncached = generate(model, token_batch(), language_ids=IDS, num_beams=3, use_cache=False)
    alone = [
        generate(model, token_batch()[i : i + 1], language_ids=IDS[i : i + 1], num_beams=3) for i in range(len(IDS))
    ]
    assert torch.equal(together, uncached)
    assert torch.equal(together, torch.cat(alone))


@ROUTINGS
def test_left_padded_prompts_equal_each_prompt_alone(routing):
    model = upcycle(pico(), trained=True, routing=routing)
    lengths = (7, 4, 2)
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    tokens = token_batch() * mask
    padded = generate(model, tokens, mask, language_ids=IDS)
    for row, length in enumerate(lengths):
        alone = generate(model, tokens[row : row + 1, 7 - length :], language_ids=IDS[row : row + 1])
        assert torch.equal(padded[row, 7 - length :], alone[0])


def test_the_language_of_a_prompt_is_given_by_code_by_default_or_by_token():
    model = upcycle(pico(), trained=True, routing="language")
    expected = generate(model, token_batch(), language_ids=torch.full((3,), 3))
    assert torch.equal(generate(model, token_batch(), language="az"), expected)
    assert torch.equal(generate(model, token_batch(), language_ids=torch.full((3, 7), 3)), expected)
    model.set_language("az")
    assert torch.equal(generate(model, token_batch()), expected)
    assert not torch.equal(generate(model, token_batch(), language="hu"), expected)


def test_new_tokens_continue_the_last_language_of_a_mixed_prompt():
    model = upcycle(pico(), trained=True, routing="language")
    tokens = token_batch(batch=1)
    ids = torch.tensor([[1, 1, 1, 3, 3, 3, 3]])
    expected = tokens
    for _ in range(NEW_TOKENS):
        following = logits(model, expected, language_ids=ids)[:, -1]
        following[:, 2] = -torch.inf
        expected = torch.cat([expected, following.argmax(-1, keepdim=True)], dim=1)
        ids = torch.cat([ids, ids[:, -1:]], dim=1)
    assert torch.equal(generate(model, tokens, language_ids=ids[:, :7]), expected)
