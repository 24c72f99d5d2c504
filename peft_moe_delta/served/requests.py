"""What a client may send: OpenAI's fields as far as they mean something here, and `language`.

A field that is not listed is refused rather than ignored, since its sender expects something of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Text = Annotated[str, Field(min_length=1)]
MOST_LOGPROBS = 20


class Fields(BaseModel):
    """Every object of a request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Fields):
    include_usage: bool = False


class Request(Fields):
    """What both kinds of requests have in common.

    Attributes:
        language: a code that the model knows, or "auto".
        max_tokens: of the answer; default: as many as the server allows.
        temperature: 0 is greedy; what is left out, as `top_p`, is as the model's generation config has it.
        return_token_ids: tell the ids of prompt and answer, as vLLM does.
    """

    model: str | None = None
    language: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Request):
    """A text, or token ids, to be continued; or several of them.

    Attributes:
        echo: the prompt comes first in the answer, with its log-probabilities where they are asked for.
        logprobs: how many likely tokens to tell at each place.
    """

    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str | list[int]], Field(min_length=1)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [one for one in self.prompt if isinstance(one, int)]
        return [ids] if ids else [one for one in self.prompt if not isinstance(one, int)]


class Part(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    @property
    def text(self) -> str:
        """The content, its parts put together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Request):
    """A conversation to be continued.

    Attributes:
        max_completion_tokens: OpenAI's newer name of `max_tokens`.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @field_validator("max_tokens")
    @classmethod
    def _writes(cls, tokens: int | None) -> int | None:
        if tokens == 0:
            raise ValueError("a conversation is answered with one token or more")
        return tokens


class TokenizeRequest(Fields):
    """As vLLM's; a field of llama.cpp's is read alike."""

    prompt: str
    model: str | None = None
    language: str | None = None
    add_special_tokens: bool = True
    content: str | None = None
    add_special: bool | None = None
