"""Whether a server answers as the exported checkpoint does in plain transformers, check by check.

In: `Reference`, `Server` and prompts. Out: a `Comparison`, whose findings agree, differ, or were not offered. What a
server does not offer is never agreement.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from .client import NotOffered, Reply, Server
from .prompts import Prompt
from .reference import Answer, Reference

AGREES, DIFFERS, NOT_OFFERED = "agrees", "differs", "not offered"
CHECKS = (
    "token ids",
    "prompt log-probabilities",
    "greedy text",
    "greedy log-probabilities",
    "chat prompt",
    "chat text",
)


@dataclass(frozen=True)
class Finding:
    """One check of one language.

    Attributes:
        check: one of `CHECKS`.
        language: of the prompt.
        outcome: `AGREES`, `DIFFERS` or `NOT_OFFERED`.
        difference: the largest difference of log-probabilities, where they were compared; NaN where the server has one.
        detail: the first difference, how the server declined, or which tie fell otherwise.
    """

    check: str
    language: str
    outcome: str
    difference: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    """Every finding, and what was compared."""

    export: str
    server: str
    version: str | None
    tolerance: float
    max_tokens: int
    findings: tuple[Finding, ...]

    @property
    def agrees(self) -> bool:
        """Whether something was compared, and nothing differs."""
        outcomes = {finding.outcome for finding in self.findings}
        return AGREES in outcomes and DIFFERS not in outcomes

    def json(self) -> str:
        """Everything; a difference that is no finite number is null, with its outcome beside it."""
        fields = asdict(self)
        for finding in fields["findings"]:
            if finding["difference"] is not None and not math.isfinite(finding["difference"]):
                finding["difference"] = None
        return json.dumps({"agrees": self.agrees, **fields}, indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """A row for each check and a column for each language, then the first difference of each check."""
        languages = list(dict.fromkeys(finding.language for finding in self.findings))
        cells = {(finding.check, finding.language): _cell(finding) for finding in self.findings}
        rows = [["", *languages], *([check, *(cells[check, code] for code in languages)] for check in CHECKS)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *self._remarks(), self._verdict()])

    def _remarks(self) -> Iterator[str]:
        """What is to be said of each check and outcome, once."""
        said = set()
        for finding in self.findings:
            if finding.detail and (finding.check, finding.outcome) not in said:
                said.add((finding.check, finding.outcome))
                yield f"{finding.check}, {finding.language}: {finding.outcome}: {finding.detail}"

    def _verdict(self) -> str:
        within = f"within {self.tolerance:g}"
        if self.agrees:
            return f"{self.server} agrees with {self.export} {within} wherever it answers"
        outcomes = {finding.outcome for finding in self.findings}
        if DIFFERS in outcomes:
            return f"{self.server} does not agree with {self.export} {within}"
        return f"{self.server} offers nothing that could be compared with {self.export}"


def compare(
    reference: Reference,
    server: Server,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 16,
    max_prompt_tokens: int = 256,
    progress: Callable[[Sequence[Prompt]], Sequence[Prompt]] = lambda prompts: prompts,
) -> Iterator[Finding]:
    """Every check of every prompt.

    Args:
        reference: the export.
        server: who is asked the same.
        prompts: in each language one.
        max_tokens: of each answer.
        max_prompt_tokens: longer prompts are cut off; conversations are given whole.
        progress: wraps the prompts, as `tqdm.tqdm` does.

    Raises:
        DataError: the model has no positions for a prompt and its answer.
        ServingError: the server fails, or is gone.
    """
    for prompt in progress(prompts):
        yield from _text(reference, server, prompt, max_prompt_tokens, max_tokens)
        yield from _chat(reference, server, prompt, max_tokens)


Outcome = tuple[bool, float | None, str]
"""Whether they agree, by how much numbers differ, and what is to be said."""


def _checked(check: str, prompt: Prompt, question: Callable[[], Outcome]) -> Finding:
    try:
        agrees, difference, detail = question()
    except NotOffered as error:
        return Finding(check, prompt.language, NOT_OFFERED, detail=str(error))
    return Finding(check, prompt.language, AGREES if agrees else DIFFERS, difference, detail)


def _text(
    reference: Reference, server: Server, prompt: Prompt, max_prompt_tokens: int, max_tokens: int
) -> Iterator[Finding]:
    """A text's tokens and their log-probabilities, and how it goes on."""
    ids = reference.ids_of(prompt.text)
    yield _checked("token ids", prompt, lambda: _same_ids(reference, ids, server.tokens(prompt.text)))
    answer = reference.answer(ids[:max_prompt_tokens], max_tokens)
    own, known = answer.prompt[1:], answer.prompt_logprobs
    yield _checked(
        "prompt log-probabilities",
        prompt,
        lambda: _same_numbers(reference, own, known, server.prompt_logprobs(answer.prompt)),
    )
    try:
        reply = server.complete(answer.prompt, max_tokens)
    except NotOffered as error:
        for check in ("greedy text", "greedy log-probabilities"):
            yield Finding(check, prompt.language, NOT_OFFERED, detail=str(error))
        return
    yield _checked("greedy text", prompt, lambda: _same_text(reference, answer, reply))
    yield _checked("greedy log-probabilities", prompt, lambda: _same_certainty(reference, answer, reply))


def _chat(reference: Reference, server: Server, prompt: Prompt, max_tokens: int) -> Iterator[Finding]:
    """The same text as a user's turn: how many tokens the template makes of it, and the answer."""
    messages = [{"role": "user", "content": prompt.text}]
    ids = reference.ids_of_chat(messages)
    try:
        if ids is None:
            raise NotOffered("the export has no chat template")
        reply = server.chat(messages, max_tokens)
    except NotOffered as error:
        for check in ("chat prompt", "chat text"):
            yield Finding(check, prompt.language, NOT_OFFERED, detail=str(error))
        return
    yield _checked("chat prompt", prompt, lambda: _same_length(len(ids), reply.prompt_tokens))
    yield _checked("chat text", prompt, lambda: _same_text(reference, reference.answer(ids, max_tokens), reply))


def _same_ids(reference: Reference, ours: Sequence[int], theirs: Sequence[int]) -> Outcome:
    place = _first_difference(ours, theirs)
    if place is None:
        return True, None, ""
    here, there = (_token(reference, ids, place) for ids in (ours, theirs))
    return False, None, f"token {place} is {there} on the server, {here} in the export"


def _same_numbers(
    reference: Reference, ids: Sequence[int], ours: Sequence[float], theirs: Sequence[float | None]
) -> Outcome:
    """Log-probabilities of the same tokens, as far as the server tells them. NaN is no agreement."""
    told = {place: number for place, number in enumerate(theirs) if number is not None}
    if not told:
        raise NotOffered("no token to compare")
    off = {place: abs(number - ours[place]) for place, number in told.items()}
    largest = math.nan if any(map(math.isnan, off.values())) else max(off.values())
    first = next((place for place in off if not off[place] <= reference.tolerance), None)
    if first is None:
        silent = len(theirs) - len(told)
        return True, largest, f"{silent} of {len(theirs)} tokens are not told" if silent else ""
    token = _token(reference, ids, first)
    numbers = f"{told[first]:.6g} on the server, {ours[first]:.6g} in the export"
    return False, largest, f"the log-probability of {token} is {numbers}"


def _same_text(reference: Reference, answer: Answer, reply: Reply) -> Outcome:
    """The same text, and the same tokens where the server tells them; a near-tie may fall either way."""
    text = reference.text_of(answer.ids, answer.prompt)
    place = _leaves_at(reference, answer, reply)
    if place is None:
        if _same(text, reply.text):
            return True, None, ""
        return False, None, f"the same tokens are {reply.text!r} on the server, {text!r} in the export"
    if _is_tie(reference, answer, reply, place):
        return True, None, f"a near-tie of the export falls otherwise at token {place}"
    return False, None, f"from token {place} on: {reply.text!r} on the server, {text!r} in the export"


def _same_certainty(reference: Reference, answer: Answer, reply: Reply) -> Outcome:
    if reply.logprobs is None:
        raise NotOffered("no log-probabilities of new tokens")
    place = _leaves_at(reference, answer, reply)
    same = min(len(answer.ids) if place is None else place, len(reply.logprobs))
    return _same_numbers(reference, answer.ids[:same], answer.logprobs[:same], reply.logprobs[:same])


def _same_length(ours: int, theirs: int | None) -> Outcome:
    if theirs is None:
        raise NotOffered("no count of the prompt's tokens")
    said = "" if ours == theirs else f"{theirs} tokens on the server, {ours} in the export"
    return ours == theirs, None, said


def _leaves_at(reference: Reference, answer: Answer, reply: Reply) -> int | None:
    """The first new token that is not the export's, or is missing; None where the answers are the same.

    Of a server that tells no tokens, the first token with which the export's text is no longer a beginning of its text.
    """
    if reply.ids is not None:
        return _first_difference(answer.ids, [one for one in reply.ids if one not in reference.ends])
    texts = [reference.text_of(answer.ids[:count], answer.prompt) for count in range(1, len(answer.ids) + 1)]
    if _same((texts or [""])[-1], reply.text):
        return None
    return next((place for place, text in enumerate(texts) if not _begins(reply.text, text)), len(answer.ids))


def _is_tie(reference: Reference, answer: Answer, reply: Reply, place: int) -> bool:
    """Whether what the server has at a place is within the tolerance of the export's best there."""
    near = answer.near[place] if place < len(answer.near) else frozenset()
    if reply.ids is not None:
        return not near.isdisjoint(reply.ids[place : place + 1] or reference.ends)
    if _same(reference.text_of(answer.ids[:place], answer.prompt), reply.text):  # it ends there
        return not near.isdisjoint(reference.ends)
    return any(
        _goes_on(reference, answer, reply, earlier, longer=earlier < place)
        for earlier in range(place + 1)[: len(answer.near)]
    )


def _goes_on(reference: Reference, answer: Answer, reply: Reply, place: int, *, longer: bool) -> bool:
    """Whether the server's text goes on with a token that is as near as the export's at a place; before the place where
    the texts part with one that begins as the export's does, as " and" with " "."""
    before, own = answer.ids[:place], answer.ids[place : place + 1]
    shared = reference.text_of([*before, *own], answer.prompt) if longer else ""
    for other in answer.near[place] - set(own) - set(reference.ends):
        text = reference.text_of([*before, other], answer.prompt)
        if text.startswith(shared) and _begins(reply.text, text):
            return True
    return False


_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no character, or not all of one. How many of them servers write, one for each byte or
one for all, is their own affair; at the end some write none."""


def _same(ours: str, theirs: str) -> bool:
    """Whether texts are the same, but for space at both ends and bytes that are no character."""
    ours, theirs = _uniform(ours).strip(), _uniform(theirs).strip()
    return theirs.removesuffix(_UNFINISHED).rstrip() == ours.removesuffix(_UNFINISHED).rstrip()


def _begins(theirs: str, ours: str) -> bool:
    """Whether the server's text begins with this one of the export, or ends where it does but for space."""
    ours, theirs = _uniform(ours).removesuffix(_UNFINISHED).lstrip(), _uniform(theirs).lstrip()
    return theirs.startswith(ours) or theirs.rstrip() == ours.rstrip()


def _uniform(text: str) -> str:
    return re.sub(f"{_UNFINISHED}+", _UNFINISHED, text)


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _token(reference: Reference, ids: Sequence[int], place: int) -> str:
    if place >= len(ids):
        return "missing"
    return f"{reference.tokenizer.decode([ids[place]])!r} ({ids[place]})"


def _cell(finding: Finding) -> str:
    if finding.difference is None:
        return finding.outcome
    return f"{finding.outcome} ({finding.difference:.1g})"
