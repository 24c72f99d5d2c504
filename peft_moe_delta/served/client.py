"""A running server asked over HTTP: vLLM, SGLang, the llama.cpp server, ours, or whatever speaks OpenAI's protocol.

In: token ids, texts, conversations. Out: `Reply`. Servers differ in what they tell beyond the text, so each question is
asked in the ways that the known ones understand, and what none of them brings is `NotOffered`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from ..errors import ServingError
from .reference import Messages

Body = dict[str, Any]
UNKNOWN = "unknown"
OWNERS = {"llamacpp": "llama.cpp"}
"""Engines that call themselves otherwise than the engines' table does."""


class NotOffered(Exception):
    """The server does not answer such a question; the text says how it declined."""


@dataclass(frozen=True)
class Reply:
    """What a server wrote.

    Attributes:
        text: without the prompt.
        ids: its tokens; None where the server does not tell them.
        logprobs: of these tokens, NaN where the server has no number; None where it does not tell them.
        prompt_tokens: how many tokens the server counted in the prompt; None where it does not tell.
    """

    text: str
    ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    prompt_tokens: int | None


class Server:
    """A server and the model asked for.

    Args:
        url: where it listens, with or without `/v1`.
        model: as the server calls it; default: the first that it lists.
        language: for our own server: sent with every request.
        timeout: seconds to wait for an answer.

    Raises:
        ServingError: nobody listens there, or no model is listed.
    """

    def __init__(self, url: str, model: str | None = None, *, language: str | None = None, timeout: float = 120.0):
        self.root = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy for the web must not be asked for a server on this machine
        self.model = self._first_model() if model is None else model
        self.extra: Body = {} if language is None else {"language": language}

    def version(self) -> str | None:
        """As vLLM, our own and the llama.cpp server tell it."""
        for path, field in (("/version", "version"), ("/props", "build_info")):
            try:
                found = self._ask("GET", path).get(field)
            except NotOffered:
                continue
            if isinstance(found, str):
                return found
        return None

    def engine(self) -> str:
        """What the server is, by whose its models are said to be; "unknown" where nobody is named."""
        try:
            models = _list(self._ask("GET", "/v1/models"), "data")
        except NotOffered:
            return UNKNOWN
        owner = models[0].get("owned_by") if models and isinstance(models[0], dict) else None
        return OWNERS.get(owner, owner) if isinstance(owner, str) and owner else UNKNOWN

    def tokens(self, text: str) -> list[int]:
        """The ids that the server reads a text as, by `/tokenize` of vLLM (`prompt`) and llama.cpp (`content`)."""
        body = {"prompt": text, "content": text, "add_special_tokens": True, "add_special": True}
        return _list(self._ask("POST", "/tokenize", body), "tokens")

    def complete(self, prompt: Sequence[int], max_tokens: int) -> Reply:
        """A greedy continuation of token ids."""
        body = {"prompt": list(prompt), "max_tokens": max_tokens, "logprobs": 1, "return_token_ids": True}
        answer = self._ask("POST", "/v1/completions", {**body, "temperature": 0})
        choice = _choice(answer)
        ids, logprobs = _tokens_of(choice)
        written = _counted(answer, "completion_tokens")
        ended = choice.get("finish_reason") == "stop"  # by a token that is counted, and perhaps not told
        if ids is not None and written is not None and not written - ended <= len(ids) <= written:
            ids = logprobs = None  # llama.cpp leaves out tokens whose last character is not all there
        return Reply(str(choice.get("text")), ids, logprobs, _counted(answer, "prompt_tokens"))

    def chat(self, messages: Messages, max_tokens: int) -> Reply:
        """A greedy answer to a conversation."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "return_token_ids": True, "temperature": 0}
        answer = self._ask("POST", "/v1/chat/completions", body)
        choice = _choice(answer)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        return Reply(text or "", _tokens_of(choice)[0], None, _counted(answer, "prompt_tokens"))

    def prompt_logprobs(self, prompt: Sequence[int]) -> Sequence[float | None]:
        """Log-probabilities of a prompt's tokens but the first; None for one that the server does not tell.

        By `echo`, as OpenAI had it; by vLLM's `prompt_logprobs`; from llama.cpp, which has neither, token by token.
        """
        declined = []
        ways: tuple[Callable[[Sequence[int]], Sequence[float | None]], ...]
        ways = (self._echoed, self._prompt_logprobs, self._forced)
        for way in ways:
            try:
                return way(prompt)
            except NotOffered as error:
                declined.append(str(error))
        raise NotOffered("; ".join(declined))

    def _echoed(self, prompt: Sequence[int]) -> list[float]:
        body = {"prompt": list(prompt), "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        told = {"return_token_ids": True}  # or vLLM looks for the text of a prompt that it was given as ids, and fails
        _, logprobs = _tokens_of(_choice(self._ask("POST", "/v1/completions", {**body, **told})))
        if logprobs is None or len(logprobs) < len(prompt):
            raise NotOffered("no log-probabilities of the prompt come with echo")
        return list(logprobs[1 : len(prompt)])

    def _prompt_logprobs(self, prompt: Sequence[int]) -> list[float]:
        body = {"prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0}
        answer = self._ask("POST", "/v1/completions", body)
        rows = _choice(answer).get("prompt_logprobs") or answer.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(prompt):
            raise NotOffered("no prompt_logprobs")
        try:
            return [_number(row[str(token)]["logprob"]) for row, token in zip(rows[1:], prompt[1:], strict=True)]
        except (KeyError, TypeError) as error:
            raise NotOffered("prompt_logprobs without the prompt's own tokens") from error

    def _forced(self, prompt: Sequence[int]) -> list[float | None]:
        """llama.cpp tells log-probabilities before any bias, so a bias may choose the token that is asked about.

        It tells none of a token whose last character is not all there, as bytes of a rare letter are.
        """
        self._ask("GET", "/props")  # llama.cpp's own
        found: list[float | None] = []
        for place in range(1, len(prompt)):
            bias = [[prompt[place], 1e9]]
            body = {"prompt": list(prompt[:place]), "max_tokens": 1, "logprobs": 1, "logit_bias": bias}
            ids, logprobs = _tokens_of(_choice(self._ask("POST", "/v1/completions", {**body, "temperature": 0})))
            if ids and ids[0] != prompt[place]:
                raise NotOffered("the token asked about did not come")
            found.append(logprobs[0] if ids and logprobs else None)
        return found

    def _first_model(self) -> str:
        try:
            models = _list(self._ask("GET", "/v1/models"), "data")
        except NotOffered as error:
            raise ServingError(f"{self.root} lists no models ({error}). Give its name with --model.") from error
        if not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise ServingError(f"{self.root} lists no models. Give its name with --model.")
        return str(models[0]["id"])

    def _ask(self, method: str, path: str, body: Body | None = None) -> Body:
        """An answer as JSON.

        Raises:
            NotOffered: the server declines (4xx, 501), or answers something else than a JSON object.
            ServingError: it cannot be reached, or fails.
        """
        given = None if body is None else {"model": self.model, **body, **self.extra}
        try:
            answer = self.session.request(method, self.root + path, json=given, timeout=self.timeout)
        except requests.RequestException as error:
            raise ServingError(
                f"{self.root}{path}: no answer ({error}). Start the server, or check --url and --timeout."
            ) from error
        if answer.status_code >= 500 and answer.status_code != 501:
            raise ServingError(
                f"{self.root}{path}: status {answer.status_code}: {_said(answer)}. See the server's log."
            )
        if answer.status_code >= 400:
            raise NotOffered(f"{path}: status {answer.status_code}: {_said(answer)}")
        try:
            found = answer.json()
        except ValueError as error:
            raise NotOffered(f"{path}: not JSON") from error
        if not isinstance(found, dict):
            raise NotOffered(f"{path}: not a JSON object")
        return found


def _said(answer: requests.Response) -> str:
    """An error as the server put it, in a line."""
    return " ".join(answer.text.split())[:200]


def _choice(answer: Body) -> Body:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NotOffered("an answer without choices")
    return choices[0]


def _list(answer: Body, field: str) -> list[Any]:
    found = answer.get(field)
    if not isinstance(found, list):
        raise NotOffered(f"an answer without {field}")
    return found


def _counted(answer: Body, field: str) -> int | None:
    """How many tokens the server counts."""
    usage = answer.get("usage")
    found = usage.get(field) if isinstance(usage, dict) else None
    return found if isinstance(found, int) else None


def _tokens_of(choice: Body) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Ids and log-probabilities: OpenAI's lists (vLLM, ours), or llama.cpp's list of tokens."""
    logprobs: Mapping[str, Any] = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    content, numbers = logprobs.get("content"), logprobs.get("token_logprobs")
    if isinstance(content, list):
        ids = [token.get("id") for token in content] if ids is None else ids
        numbers = [token.get("logprob") for token in content]
    told = isinstance(ids, list) and all(isinstance(one, int) for one in ids)
    return (
        tuple(ids) if told and isinstance(ids, list) else None,
        tuple(map(_number, numbers)) if isinstance(numbers, list) else None,
    )


def _number(value: Any) -> float:
    """JSON has no NaN, so a server that computes one may send null."""
    return float(value) if isinstance(value, int | float) else math.nan
