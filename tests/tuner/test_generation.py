"""Generation: what the cache remembers equals what a full pass recomputes, whoever shares the batch."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, pipeline
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from builders import VOCABULARY, logits, pico, token_batch, upcycle
from peft_moe_delta.errors import LanguageError, PlanError
from training.common import make_tokenizer

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


REPETITIVE = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
MIXED = torch.tensor([[1] * 5 + [3] * 7])


def token_by_token(model, tokens, language=None, ids=None):
    """What uncached passes give, one for each new token."""
    for _ in range(NEW_TOKENS):
        arguments = {"language": language} if ids is None else {"language_ids": ids}
        following = logits(model, tokens, **arguments)[:, -1]
        following[:, 2] = -torch.inf
        tokens = torch.cat([tokens, following.argmax(-1, keepdim=True)], dim=1)
        if ids is not None:
            ids = torch.cat([ids, ids[:, -1:]], dim=1)
    return tokens


def with_cached_start(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(REPETITIVE[:, :4], language_ids=MIXED[:, :4], past_key_values=cache, use_cache=True)
    return {"past_key_values": cache}


WAYS = {
    "cached": lambda model: {},
    "uncached": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
    "continued cache": with_cached_start,
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "prompt lookup as long as the prompt": lambda model: {"prompt_lookup_num_tokens": REPETITIVE.shape[1] - 1},
    "prefill in chunks": lambda model: {"prefill_chunk_size": 5},
    "plain assistant": lambda model: {"assistant_model": pico(seed=3)},
    "upcycled assistant": lambda model: {"assistant_model": upcycle(pico(seed=3), trained=True).base_model.model},
    "itself as assistant": lambda model: {"assistant_model": copy.deepcopy(model).base_model.model},
}


@ROUTINGS
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore")  # transformers deprecates its own arguments in some of these
def test_every_way_of_generating_equals_token_by_token(way, routing):
    model = upcycle(pico(), trained=True, routing=routing)
    assert torch.equal(
        generate(model, REPETITIVE, language_ids=MIXED, **way(model)), token_by_token(model, REPETITIVE, ids=MIXED)
    )
    in_turkic = token_by_token(model, REPETITIVE, "az")
    if way is not with_cached_start:  # whose start is in another language
        assert torch.equal(generate(model, REPETITIVE, language="az", **way(model)), in_turkic)
        assert torch.equal(generate(model, REPETITIVE, language_ids=torch.tensor([3]), **way(model)), in_turkic)


@pytest.mark.parametrize("cache", [True, False])
def test_prompts_of_mixed_languages_and_several_beams(cache):
    model = upcycle(pico(), trained=True, routing="language")
    beams = generate(model, REPETITIVE, language_ids=MIXED, num_beams=3, num_return_sequences=2, use_cache=cache)
    assert beams.shape[0] == 2
    everything = torch.full_like(beams, 3)
    everything[:, :12] = MIXED
    best = logits(model, beams, language_ids=everything).log_softmax(-1)[:, 11:-1]
    scores = best.gather(-1, beams[:, 12:, None]).sum((1, 2))
    assert scores[0] >= scores[1]
    assert torch.equal(beams, generate(model, REPETITIVE, language_ids=MIXED, num_beams=3, num_return_sequences=2))


def test_embeddings_as_prompt():
    model = upcycle(pico(), trained=True, routing="language")
    mask = torch.ones_like(REPETITIVE)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for cache in (True, False):
        found = model.generate(
            inputs_embeds=model.get_input_embeddings()(REPETITIVE),
            attention_mask=mask,
            language_ids=MIXED,
            use_cache=cache,
            **options,
        )
        assert torch.equal(found, token_by_token(model, REPETITIVE, ids=MIXED)[:, 12:])


def test_a_continued_cache_needs_the_languages_of_what_is_in_it():
    model = upcycle(pico(), trained=True, routing="language")
    with pytest.raises(LanguageError, match=r"8 ids a row where the prompt has 12 tokens.*each token so far"):
        generate(model, REPETITIVE, language_ids=MIXED[:, 4:], **with_cached_start(model))


def with_new_tokens(**fields):
    model = upcycle(pico(), trained=True, **fields)
    model.add_tokens(["x", "y"], VOCABULARY, [[3, 4], [5]])
    return model


NEW_IDS = torch.tensor([[5, 99, 7, 100, 9, 5, 99, 7, 100, 9, 5, 99]])


@pytest.mark.parametrize("way", [WAYS["cached"], WAYS["prompt lookup"], WAYS["itself as assistant"]])
@pytest.mark.filterwarnings("ignore")
def test_new_tokens_in_every_way_of_generating(way):
    model = with_new_tokens()
    assert torch.equal(generate(model, NEW_IDS, **way(model)), token_by_token(model, NEW_IDS))
    assert model.config.vocab_size == VOCABULARY
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 2
    assert model.get_input_embeddings().embedding_dim == 32


def test_new_tokens_without_their_adapter_are_refused():
    model = with_new_tokens()
    with model.disable_adapter():
        assert torch.equal(logits(model, REPETITIVE), logits(pico(), REPETITIVE))
        assert model.get_input_embeddings().num_embeddings == VOCABULARY
        with pytest.raises(PlanError, match="Token 100 is none of the base model's 99.*base model's tokenizer"):
            logits(model, NEW_IDS)


def test_continuous_batching_takes_the_default_language():
    model = upcycle(pico(), trained=True, routing="language")
    model.set_language("az")
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # by default most of the machine's memory
    (found,) = model.base_model.model.generate_batch([REPETITIVE[0].tolist()], config, room).values()
    expected = REPETITIVE
    for _ in range(NEW_TOKENS):
        expected = torch.cat([expected, logits(model, expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert found.generated_tokens == expected[0, 12:].tolist()


def in_batches(model, prompts, **options):
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    found = model.generate_batch([prompt.tolist() for prompt in prompts], config, room, **options)
    assert list(found) == [answer.request_id for answer in found.values()] == [f"req_{n}" for n in range(len(prompts))]
    return [answer.generated_tokens for answer in found.values()]


def test_continuous_batching_takes_a_language_for_all_prompts_or_one_for_each():
    model = upcycle(pico(), trained=True, routing="language")
    prompts = list(token_batch(batch=4))
    codes = ["az", "en", "az", "hu"]

    def alone(prompt, code):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "language": code}
        return model.generate(input_ids=prompt[None], **options)[0, len(prompt) :].tolist()

    expected = [alone(prompt, code) for prompt, code in zip(prompts, codes, strict=True)]
    assert in_batches(model, prompts, language=codes) == expected
    assert in_batches(model, prompts[:1], language="az") == expected[:1]
    model.set_language("en")
    assert in_batches(model, prompts[1:2]) == expected[1:2]


def test_continuous_batching_refuses_what_its_thread_could_not_say():
    model = upcycle(pico(), trained=True, routing="language")
    for reason, options in {
        "language of the prompts": {},
        "1 codes for 2": {"language": ["hu"]},
        "Unknown language .xx.": {"language": "xx"},
        "no language can be read": {"language": "auto"},
        "no `language_ids`": {"language_ids": torch.tensor([0, 1])},
        "serves one language": {"language": ["hu", "az"], "persistent_manager": True},
    }.items():
        with pytest.raises(LanguageError, match=reason):
            model.generate_batch([[3, 4], [5]], **options)
    with pytest.raises(LanguageError, match="no language can be read"):
        upcycle(pico(), routing="context").generate_batch([[3, 4]])


OTHERS = {"fi": "original", "de": "x"}


@pytest.mark.filterwarnings("ignore")
def test_an_assistant_of_other_languages_is_told_none():
    model = upcycle(pico(), trained=True, routing="language")
    assistant = upcycle(pico(seed=3), trained=True, languages=OTHERS, experts={"x": 1}).base_model.model
    expected = token_by_token(model, REPETITIVE, "az")
    assert torch.equal(generate(model, REPETITIVE, language="az", assistant_model=assistant), expected)
    assert torch.equal(generate(model, REPETITIVE, language_ids=torch.tensor([3]), assistant_model=assistant), expected)


@pytest.mark.filterwarnings("ignore")
def test_threads_with_an_assistant_keep_their_languages():
    model, assistant = upcycle(pico(), trained=True, routing="language"), pico(seed=3)
    expected = {code: token_by_token(model, REPETITIVE, code) for code in ("az", "hu", "en")}
    codes = ["az", "hu", "en"] * 3
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(
            lambda code: generate(model, REPETITIVE, language=code, assistant_model=copy.deepcopy(assistant)), codes
        )
        assert all(torch.equal(one, expected[code]) for one, code in zip(found, codes, strict=True))


def test_a_pipeline_takes_a_language():
    model = upcycle(pico(), trained=True, routing="language")
    tokenizer = make_tokenizer()
    generator = pipeline("text-generation", model=model.base_model.model, tokenizer=tokenizer)
    text = tokenizer.decode(REPETITIVE[0])
    for code in ("az", "hu"):
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        found = generator(text, language=code, return_tensors=True, **options)
        assert found[0]["generated_token_ids"] == token_by_token(model, REPETITIVE, code)[0].tolist()
