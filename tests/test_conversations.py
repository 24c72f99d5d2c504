"""Conversations that a model makes up: its own template around them, seeded, ended, and nothing else touched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from builders import pico, upcycle
from peft_moe_delta import made_up_conversations
from peft_moe_delta.errors import DataError
from training.common import make_tokenizer

CHAT = (
    "{% for m in messages %}{{ 'w5' if m.role == 'user' else 'w6' }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w6 {% endif %}"
)
"""Turns begin with a word of their role and end with end-of-text."""


def chat_tokenizer(template=CHAT):
    return make_tokenizer(chat_template=template)


def make_up(model, number=6, tokenizer=None, **options):
    return made_up_conversations(model, tokenizer or chat_tokenizer(), number, max_new_tokens=5, **options)


def test_a_conversation_is_a_question_and_the_models_own_answer_in_the_template():
    model, tokenizer = pico(), chat_tokenizer()
    made = make_up(model, 20, batch_size=7)
    assert len(made) == 20
    for text in made:
        words = text.split()
        assert (words[0], words[-1], words.count("<eos>")) == ("w5", "<eos>", 2)
        question, answer = " ".join(words[1:-1]).split(" <eos> w6")
        assert 1 <= len(question.split()) <= 5 and len(answer.split()) <= 5
        prompt = tokenizer(f"w5 {question} <eos> w6", return_tensors="pt")["input_ids"]
        greedy = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=2, eos_token_id=2)
        written = tokenizer.decode(greedy[0, prompt.shape[1] :], skip_special_tokens=True)
        assert answer.split() == written.split()


def test_the_seed_decides_and_torchs_own_state_is_left_alone():
    model, state = pico(), torch.random.get_rng_state()
    first, again, other = (make_up(model, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(set(first)) > 1


def test_a_grafts_experts_take_no_part():
    grafted = upcycle(pico(), trained=True, routing="learned")
    assert make_up(grafted) == make_up(pico())


def test_templates_whose_turns_end_in_plain_text_are_cut_there():
    model = pico()
    said = [text.split(" <eos>")[0].split()[1:] for text in make_up(model, 40)]
    (end, _), *_ = Counter(word for words in said for word in words[1:]).most_common(1)
    template = "{% for m in messages %}w5 {{ m.content }} END w98 {% endfor %}".replace("END", end)
    questions = [text.split(f" {end} w98 ")[0].split()[1:] for text in make_up(model, 40, chat_tokenizer(template))]
    assert all(question and end not in question for question in questions)
    assert any(len(question) < 5 for question in questions)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, r"no chat template.*conversations=\[\]"),
        ("hello", {}, "shows what the user says 0 times"),
        ("{% for m in messages %}{{ m.content }} w3 {{ m.content }}{% endfor %}", {}, "2 times, expected once"),
        ("{% for m in messages %}{{ m.content }} w3{% endfor %}", {}, "nothing to sample on from"),
        (CHAT, {"number": 0}, "number: got 0"),
        (CHAT, {"temperature": 0.0}, "temperature: got 0"),
    ],
)
def test_what_cannot_be_made_up_is_refused(template, options, message):
    with pytest.raises(DataError, match=message):
        make_up(pico(), tokenizer=chat_tokenizer(template), **options)


def test_a_model_that_says_nothing_is_refused():
    model = pico()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, 99)
        model.lm_head.bias.copy_(torch.full((99,), -100.0).index_fill(0, torch.tensor(2), 100.0))
    with pytest.raises(DataError, match="ends its turn at once"):
        make_up(model)
