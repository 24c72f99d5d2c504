"""The demo's post-training: small tasks about words, asked in English, each with one right answer.

In: word counts of the demo's texts. Out: tasks `{"prompt", "answer", "kind", "language"}`. A model learns them from
English words only; asked about Hungarian words, they show whether what post-training taught carries over to a language
it never saw. Training, validation and test share no word.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from demo_text import words
from peft_moe_delta.errors import DataError

Task = dict[str, str]

FEWEST_OCCURRENCES = 3
FEWEST_CHOICES = 50  # three of fifty words make some hundred thousand different tasks
SHORTEST, LONGEST = 3, 9

# kind -> (number of words, the question, the answer). English prompts stay below 24 tokens.
KINDS: dict[str, tuple[int, str, Callable[[Sequence[str]], str]]] = {
    "third": (4, "Repeat the third word of: {words}", lambda given: given[2]),
    "before": (4, "Repeat the word before {2} in: {words}", lambda given: given[1]),
    "without": (4, "Leave out the second word of: {words}", lambda given: f"{given[0]} {given[2]} {given[3]}"),
    "ends": (
        4,
        "Swap the first and last word of: {words}",
        lambda given: f"{given[3]} {given[1]} {given[2]} {given[0]}",
    ),
    "reverse": (3, "Reverse the words: {words}", lambda given: " ".join(given[::-1])),
    "hyphen": (3, "Join with hyphens: {words}", "-".join),
}


def vocabulary(texts: Iterable[str], without: Iterable[str] = ()) -> Counter[str]:
    """Common lower-case words of 3 to 9 letters, with how often they occur, except those that occur in `without`."""
    excluded = {word.casefold() for text in without for word in words(text)}
    counts = Counter(word for text in texts for word in words(text))
    return Counter(
        {
            word: count
            for word, count in counts.items()
            if word.islower()
            and SHORTEST <= len(word) <= LONGEST
            and count >= FEWEST_OCCURRENCES
            and word not in excluded
        }
    )


def part_of(word: str) -> str:
    """A hash of the word says whether it belongs to test (30%), validation (10%) or training tasks."""
    bucket = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 10
    return "test" if bucket < 3 else "validation" if bucket < 4 else "train"


def make_tasks(counts: Counter[str], part: str, language: str, number: int, seed: int = 0) -> list[Task]:
    """`number` different tasks with the words of one part, all kinds equally often, common words more often."""
    rng = random.Random(f"{seed} {part} {language}")
    choices = sorted(word for word in counts if part_of(word) == part)
    if len(choices) < FEWEST_CHOICES:
        raise DataError(
            f"{part} tasks in {language!r}: got {len(choices)} words, expected {FEWEST_CHOICES} or more. "
            "Pass the counts of more text."
        )
    weights = [counts[word] ** 0.5 for word in choices]  # common words more often, but not the same few all the time
    kinds = list(KINDS)
    tasks: dict[str, Task] = {}
    while len(tasks) < number:
        task = _task(kinds[len(tasks) % len(kinds)], _draw(rng, choices, weights), language)
        tasks.setdefault(task["prompt"], task)
    return list(tasks.values())


def _draw(rng: random.Random, choices: Sequence[str], weights: Sequence[float]) -> list[str]:
    """As many different words as the longest kind of task needs."""
    needed = max(length for length, _, _ in KINDS.values())
    drawn: dict[str, None] = {}
    while len(drawn) < needed:
        drawn.update(dict.fromkeys(rng.choices(choices, weights)))
    return list(drawn)


def _task(kind: str, drawn: Sequence[str], language: str) -> Task:
    length, question, answer = KINDS[kind]
    given = drawn[:length]
    return {
        "prompt": f"Question: {question.format(*given, words=' '.join(given))}\nAnswer:",
        "answer": f" {answer(given)}",
        "kind": kind,
        "language": language,
    }
