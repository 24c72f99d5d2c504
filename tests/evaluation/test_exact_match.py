"""Exact match: the same verdict as greedy generation, whatever the batch."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from chance import shifted
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import encode_task, exact_match


@pytest.fixture
def model(pico_model, word_tokenizer):
    """A random model that is fond of ending: otherwise it would answer next to nothing right."""
    model = pico_model(len(word_tokenizer)).eval()
    model.lm_head.weight.data[word_tokenizer.eos_token_id] *= 3
    return model


def generate(model, tokenizer, prompt: str, limit: int = 12) -> list[int]:
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return output[0, len(ids) :].tolist()


@pytest.fixture
def tasks(model, word_tokenizer):
    """Tasks of which some are answered right (the model's own words), others nearly: a word changed, cut or added."""
    rng = np.random.default_rng(shifted(0))
    made = []
    for _ in range(60):
        prompt = " ".join(f"w{word}" for word in rng.integers(20, size=rng.integers(1, 9)))
        words = [token for token in generate(model, word_tokenizer, prompt) if token != word_tokenizer.eos_token_id]
        edits = [words, words[:-1], [*words, 5], [*words[:-1], 2 + (words[-1] - 1) % 20] if words else []]
        made += [{"prompt": prompt, "answer": " " + word_tokenizer.decode(edit)} for edit in edits if edit]
    return made


def test_teacher_forcing_equals_greedy_generation(model, word_tokenizer, tasks, holds):
    written = {prompt: generate(model, word_tokenizer, prompt, limit=16) for prompt in {t["prompt"] for t in tasks}}
    expected = []
    for task in tasks:
        answer = word_tokenizer(task["answer"], add_special_tokens=False)["input_ids"] + [word_tokenizer.eos_token_id]
        expected.append(float(written[task["prompt"]][: len(answer)] == answer))
    score = exact_match(model, word_tokenizer, tasks, batch_size=7)
    holds(np.mean(expected), above=0.05, below=0.95)  # the test needs right and wrong answers
    np.testing.assert_array_equal(score.correct, expected)
    assert score.value == pytest.approx(np.mean(expected))


def test_batch_size_order_and_wrapper_do_not_matter(model, word_tokenizer, tasks):
    one = exact_match(model, word_tokenizer, tasks, batch_size=1)
    many = exact_match(model, word_tokenizer, tasks[::-1], batch_size=50, progress=list)
    np.testing.assert_array_equal(many.correct[::-1], one.correct)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    np.testing.assert_array_equal(exact_match(wrapped, word_tokenizer, tasks).correct, one.correct)


def test_encoding_by_hand(word_tokenizer):
    assert encode_task(word_tokenizer, "w0 w1", " w3") == ([0, 2, 3, 5, 1], [-100, -100, -100, 5, 1])
    word_tokenizer.bos_token = None
    assert encode_task(word_tokenizer, "w0 w1", " w3") == ([2, 3, 5, 1], [-100, -100, 5, 1])


def test_refuses(model, word_tokenizer):
    with pytest.raises(DataError, match="an empty list"):
        exact_match(model, word_tokenizer, [])
    with pytest.raises(DataError, match=r"tasks\[0\]: got the keys \['question'\]"):
        exact_match(model, word_tokenizer, [{"question": "w1"}])
    with pytest.raises(DataError, match="expected both"):
        exact_match(model, word_tokenizer, [{"prompt": "w1", "answer": ""}])
    word_tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        encode_task(word_tokenizer, "w0", "w1")
