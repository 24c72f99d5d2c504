"""One string never passes for a list of documents, wherever documents are taken."""

from __future__ import annotations

import pytest

from builders import pico, upcycle
from greek import make_tokenizer
from peft_moe_delta import evaluate_languages, extend_vocabulary, fit_routers, propose_tokens
from peft_moe_delta.allocation import measure_languages
from peft_moe_delta.documents import check_documents, each_document
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import bits_per_byte, closest_group, exact_match, fertility, language_confusion
from peft_moe_delta.evaluation.callback import LanguageEvaluationCallback
from peft_moe_delta.evaluation.generation import generate
from peft_moe_delta.evaluation.routes import routing_by_language
from peft_moe_delta.evaluation.scoring import Material

TEXT = "a text that is long enough to be measured, were each of its letters a document " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return upcycle(pico(vocab_size=len(tokenizer)), trained=True)


def everything(model, tokenizer, text):
    """Every function that takes documents, called with something in their place."""
    base, every = pico(vocab_size=len(tokenizer)), {code: ["a document"] for code in ("en", "hu", "az")}
    return {
        "fit_routers": lambda: fit_routers(model, every | {"hu": text}, tokenizer),
        "measure_languages": lambda: measure_languages(base, tokenizer, {"en": ["a document"] * 9, "hu": text}),
        "evaluate_languages": lambda: evaluate_languages({"nobody": "/nowhere"}, {"hu": text}),
        "its prompts": lambda: evaluate_languages({"nobody": "/nowhere"}, {}, prompts={"hu": text}),
        "Material": lambda: Material(texts={"hu": text}),
        "LanguageEvaluationCallback": lambda: LanguageEvaluationCallback(None, tokenizer, {"hu": text}),
        "language_confusion": lambda: language_confusion(text, "hu"),
        "bits_per_byte": lambda: bits_per_byte(model, tokenizer, text),
        "closest_group": lambda: closest_group(model, tokenizer, text),
        "routing_by_language": lambda: routing_by_language(model, tokenizer, text, name="", language="hu"),
        "fertility": lambda: fertility(text, tokenizer),
        "generate": lambda: generate(model, tokenizer, text),
        "propose_tokens": lambda: propose_tokens(text, tokenizer, 3),
        "its original_texts": lambda: propose_tokens(["a document"], tokenizer, 3, original_texts=text),
        "extend_vocabulary": lambda: extend_vocabulary(model, tokenizer, ["ðx"], texts=text, language="hu"),
    }


@pytest.mark.parametrize(
    ("text", "got"),
    [(TEXT, "got one string"), (TEXT.encode(), "got one string"), ({"text": [TEXT]}, "got dict"), (3, "got int")],
)
def test_what_is_no_list_of_documents_is_refused_wherever_documents_are_taken(model, tokenizer, text, got):
    ended = {}
    for name, call in everything(model, tokenizer, text).items():
        with pytest.raises(Exception) as caught:
            call()
        ended[name] = caught.value
    assert {n: e for n, e in ended.items() if not (isinstance(e, DataError) and got in str(e))} == {}


def test_languages_and_their_documents_are_a_mapping(model, tokenizer):
    for call in (
        lambda: fit_routers(model, TEXT, tokenizer),
        lambda: measure_languages(pico(vocab_size=len(tokenizer)), tokenizer, [TEXT, TEXT]),
        lambda: evaluate_languages({"nobody": "/nowhere"}, TEXT),
        lambda: evaluate_languages({"nobody": "/nowhere"}, {}, prompts=[TEXT]),
        lambda: LanguageEvaluationCallback(None, tokenizer, [TEXT]),
    ):
        with pytest.raises(DataError, match="expected languages with documents"):
            call()


@pytest.mark.parametrize("task", ["1+1=", {"prompt": "1+1="}])
def test_tasks_have_a_prompt_and_an_answer(model, tokenizer, task):
    with pytest.raises(DataError, match=r"tasks\[0\]: got .*expected 'prompt' and 'answer'"):
        exact_match(model, tokenizer, [task])


def test_documents_are_read_as_far_as_they_are_asked_for():
    def stream():
        yield "one"
        yield "δύο"
        yield "\ud800"

    documents = each_document(stream(), "here")
    assert [next(documents), next(documents)] == ["one", "δύο"]
    with pytest.raises(DataError, match=r"here\[2\] is no text"):
        next(documents)


@pytest.mark.parametrize(("texts", "message"), [([], "got nothing"), (["", " "], "only empty"), ([None], "is no text")])
def test_a_list_without_text_is_refused(texts, message):
    with pytest.raises(DataError, match=message):
        check_documents(texts)
    assert check_documents(["", "a"]) == ["", "a"] and check_documents([""], blank=True) == [""]
