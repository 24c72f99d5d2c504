"""The demo's inputs: what is dropped as a repetition, what is held out, and whether the tasks' answers are right."""

import json
import re
import zipfile
from collections import Counter

import pytest

import demo_inputs
from demo_tasks import KINDS, make_tasks, part_of, vocabulary
from demo_text import ARTICLE, SPLITS, documents, leaf_strings, normalise, split_of, with_encyclopedia
from peft_moe_delta.errors import DataError

WORDS = [f"{first}{second}{third}" for first in "bcdfghjklmnprstv" for second in "aeiou" for third in "klmnprst"]


def held_out(split: str, number: int) -> list[str]:
    """Names of integrations that belong to a split."""
    names = (f"integration{index}" for index in range(10_000))
    return [name for name in names if split_of(name) == split][:number]


def paragraph(name: str, language: str) -> list[str]:
    """Ten strings that no other integration or language has."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in name.removeprefix("integration"))
    return [f"{language}{letters} {'abcdefghij'[line]} is a sentence of its own" for line in range(10)]


def test_normalise_keeps_only_the_letters_of_the_words():
    same = ["Set up {name}: 3 Hue bridges!", "  set UP hue   bridges", "Set up Hue bridges, see https://a.b/c?d=1"]
    assert [normalise(text) for text in same] == ["set up hue bridges"] * 2 + ["set up hue bridges see"]
    assert normalise("{host}:{port}") == ""
    assert normalise("Πύλη ΦΩΣ_2") == normalise("πύλη φως")


def test_leaf_strings_come_in_the_file_s_order():
    assert list(leaf_strings({"b": {"y": "1", "x": "2"}, "a": "3"})) == ["1", "2", "3"]


def test_split_is_stable_and_of_the_sizes_it_says():
    assert [split_of(name) for name in ("hue", "calendar", "wled")] == ["train", "validation", "test"]
    shares = Counter(split_of(f"integration{index}") for index in range(5000))
    assert 0.08 < shares["test"] / 5000 < 0.12
    assert 0.04 < shares["validation"] / 5000 < 0.06


def test_held_out_integrations_are_the_same_in_every_language():
    names = held_out("train", 3) + held_out("test", 4) + held_out("validation", 2)
    corpus = {language: {name: paragraph(name, language) for name in names} for language in ("en", "hu")}
    del corpus["hu"][names[3]]  # a test integration without Hungarian
    corpus["en"][names[4]] = ["Too short a text"]  # and one with next to no English
    made = documents(corpus)
    for split in ("test", "validation"):
        assert [line["source"] for line in made["en"][split]] == [line["source"] for line in made["hu"][split]]
    assert {line["source"] for line in made["en"]["test"]} == set(names[5:7])
    assert len(made["en"]["train"]) == 3
    assert made["hu"]["train"][0] == {
        "text": "\n".join(corpus["hu"][made["hu"]["train"][0]["source"]]),
        "language": "hu",
        "source": made["hu"]["train"][0]["source"],
    }


def test_repeated_untranslated_and_short_strings_are_dropped():
    train, test = held_out("train", 1)[0], held_out("test", 1)[0]
    english, hungarian = paragraph(train, "en"), paragraph(train, "hu")
    corpus = {
        "en": {train: english, test: [*paragraph(test, "en"), english[0].upper() + " 7!"]},
        "hu": {train: [*hungarian, english[3], "két szó {name}"], test: [*paragraph(test, "hu"), hungarian[1]]},
    }
    made = documents(corpus)
    assert made["hu"]["train"][0]["text"].split("\n") == hungarian
    for language in corpus:
        strings = [
            normalise(string)
            for split in SPLITS
            for line in made[language][split]
            for string in line["text"].split("\n")
        ]
        assert len(strings) == len(set(strings)) == 20


def test_english_is_held_out_as_articles_and_trained_on_as_both():
    interface = {split: [{"text": "x" * 900, "language": "en", "source": split}] for split in SPLITS}
    titles = [name for split in SPLITS for name in held_out(split, 9)]
    articles = {title: "y" * 300 for title in titles} | {"Stub": "too short"}
    made = with_encyclopedia(interface, articles)
    for split in ("validation", "test"):
        assert {line["source"] for line in made[split]} == {ARTICLE + title for title in held_out(split, 9)}
    assert made["train"][0] == interface["train"][0]
    assert len(made["train"]) == 1 + 3  # 900 bytes of articles beside the 900 bytes of interface


def test_vocabulary_takes_common_plain_words_of_one_language():
    hungarian = ["eszköz eszköz eszköz Eszköz shell shell shell az az az ritka", "{valami} {valami} {valami} ablak"]
    assert vocabulary([*hungarian, "ablak ablak"], without=["Shell script"]) == Counter(eszköz=3, ablak=3)


def solve(prompt: str) -> str:
    """The tasks as a reader would do them, from the prompt alone."""
    question, given = re.fullmatch(r"Question: (.*): (.*)\nAnswer:", prompt).groups()
    words = given.split()
    if question.startswith("Repeat the word before "):
        return words[words.index(question.split()[4]) - 1]
    return {
        "Repeat the third word of": lambda: words[2],
        "Leave out the second word of": lambda: " ".join(words[:1] + words[2:]),
        "Swap the first and last word of": lambda: " ".join([words[-1], *words[1:-1], words[0]]),
        "Reverse the words": lambda: " ".join(reversed(words)),
        "Join with hyphens": lambda: "-".join(words),
    }[question]()


@pytest.fixture
def counts() -> Counter[str]:
    return Counter({word: 3 + index for index, word in enumerate(WORDS)})


def test_every_answer_is_right(counts):
    tasks = make_tasks(counts, "train", "en", 300)
    for task in tasks:
        assert task["answer"] == " " + solve(task["prompt"])
    assert Counter(task["kind"] for task in tasks) == dict.fromkeys(KINDS, 50)
    assert len({task["prompt"] for task in tasks}) == 300
    assert {task["language"] for task in tasks} == {"en"}


def test_tasks_depend_on_the_seed_alone(counts):
    reversed_counts = Counter(dict(reversed(counts.items())))
    tasks = make_tasks(counts, "test", "hu", 60)
    assert make_tasks(reversed_counts, "test", "hu", 60) == tasks != make_tasks(counts, "test", "hu", 60, seed=1)


def test_too_few_words_are_refused():
    with pytest.raises(DataError, match="got 1 words"):
        make_tasks(Counter(river=5), part_of("river"), "en", 10)


def test_parts_share_no_word(counts):
    seen = {
        part: {word for task in make_tasks(counts, part, "en", 200) for word in re.split(r"[ -]", task["answer"][1:])}
        for part in ("train", "validation", "test")
    }
    for part, words in seen.items():
        assert {part_of(word) for word in words} == {part}


def test_a_step_appears_whole_or_not_at_all(tmp_path):
    result = tmp_path / "inputs" / "text"

    def fail(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_inputs.once(result, fail)
    assert not result.exists()
    demo_inputs.once(result, lambda folder: (folder / "whole").touch())
    demo_inputs.once(result, fail)  # skipped
    assert [path.name for path in result.iterdir()] == ["whole"]


def test_more_languages_are_read_by_their_file_s_name(tmp_path):
    wheel = tmp_path / "homeassistant.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in held_out("train", 2):
            for language, file in (("en", "en"), ("zh", "zh-Hans"), ("hu", "hu")):
                strings = dict(enumerate(paragraph(name, language)))
                archive.writestr(f"homeassistant/components/{name}/translations/{file}.json", json.dumps(strings))
    assert set(demo_inputs.read_interface(wheel, ["zh", "en"])) == {"zh", "en"}
    demo_inputs.write_more_text(wheel, "zh", tmp_path)
    lines = demo_inputs.read_lines(tmp_path / "train.jsonl")
    assert [line["source"] for line in lines] == held_out("train", 2)
    assert all(line["language"] == "zh" and line["text"].startswith("zh") for line in lines)
    with pytest.raises(DataError, match="no text in 'xx'"):
        demo_inputs.write_more_text(wheel, "xx", tmp_path)
