"""What Ollama is told of a GGUF file: its `Modelfile`, with the chat template and how tokens are chosen.

In: an export's tokenizer and generation config. Out: the file's text. Ollama writes chat templates in Go's language and
cannot run those of tokenizers, which are Jinja. Most of these only put something before and after each turn, and that
is found by asking them: what is found is compared with the template on other conversations, or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..loading import load_config, load_tokenizer

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for what is said: no template has it, or trims it
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""What transformers takes where a generation config leaves it open."""
TRIES = (
    ("user",), ("user", "assistant", "user", "assistant", "user"), ("user", "user"), ("system", "user"),
    ("system", "user", "assistant", "user"),
)  # fmt: skip
"""Who speaks in the conversations by which turns are found, and compared. A template may refuse the last three."""


@dataclass(frozen=True)
class Turns:
    """A chat template that writes turn after turn.

    Attributes:
        opening: what it begins with.
        unasked: what follows where no system message comes first, such as a system message of its own.
        around: role -> what stands before and after what is said.
        prompt: what the answer follows.
    """

    opening: str
    unasked: str
    around: dict[str, tuple[str, str]]
    prompt: str

    def render(self, roles: Sequence[str], says: Sequence[str]) -> str:
        """A conversation, ready for an answer."""
        first = "" if roles[0] == "system" else self.unasked
        turns = [text.join(self.around[role]) for role, text in zip(roles, says, strict=True)]
        return "".join([self.opening, first, *turns, self.prompt])

    def go(self) -> str:
        """The same in Go's template language, as Ollama reads it."""
        whose = [
            f'{{{{ if eq .Role "{r}" }}}}{b}{{{{ .Content }}}}{a}{{{{ end }}}}' for r, (b, a) in self.around.items()
        ]
        unasked = (
            f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.unasked}{{{{ end }}}}' if self.unasked else ""
        )
        return f"{self.opening}{unasked}{{{{ range .Messages }}}}{''.join(whose)}{{{{ end }}}}{self.prompt}"


def turns_of(tokenizer: Any) -> Turns | None:
    """The turns of a tokenizer's chat template; None where it does more than write turn after turn.

    A beginning-of-text token that the tokenizer adds to every text is left out: llama.cpp adds it, too.
    """
    begun = _begins(tokenizer)
    if "strftime_now" in tokenizer.chat_template:
        return None
    try:
        found = _found({roles: text for roles in TRIES if (text := _rendered(tokenizer, roles, begun)) is not None})
    except (KeyError, ValueError):
        return None
    pieces = [found.opening, found.unasked, found.prompt, *(piece for pair in found.around.values() for piece in pair)]
    if any(sign in piece for piece in pieces for sign in ("{{", "}}", '"""', MARK)):
        return None
    for roles in TRIES:
        says = [f"{role} {place} says" for place, role in enumerate(roles)]
        expected = _rendered(tokenizer, roles, begun, says)
        if expected is not None and found.render(roles, says) != expected:
            return None
    return found


def modelfile(file: str, folder: Path) -> str:
    """The `Modelfile` of a GGUF file.

    Args:
        file: its name; it lies beside.
        folder: the export. What its generation config leaves open is as transformers has it, since Ollama differs.

    Raises:
        CheckpointError: the export has no tokenizer, or no config.
    """
    tokenizer, generation = load_tokenizer(folder), _generation(folder)
    lines = [f"FROM ./{file}"]
    turns = turns_of(tokenizer) if tokenizer.chat_template else None
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go()}"""')
    elif tokenizer.chat_template:
        lines.append(
            "# The chat template does more than write turn after turn. Ollama has its own for templates that it knows; "
            "look what it took with `ollama show --template`."
        )
    values: dict[str, Any] = {"temperature": 0}
    if generation.do_sample:
        values = {name: _or(getattr(generation, name, None), default) for name, default in SAMPLING.items()}
    values["repeat_penalty"] = _or(generation.repetition_penalty, 1.0)
    lines += [f"PARAMETER {name} {value}" for name, value in values.items()]
    return "\n".join([*lines, *(f'PARAMETER stop "{text}"' for text in _stops(tokenizer, generation))]) + "\n"


def _found(whole: dict[tuple[str, ...], str]) -> Turns:
    """The pieces of conversations in which each turn says `MARK`.

    What stands between two turns is the end of the one and the beginning of the other. Ends of a role are what all that
    follows it has in common, where the template lets anything follow.

    Raises:
        ValueError: a turn is missing, or is said twice.
        KeyError: the template refuses a plain conversation.
    """
    parts = {roles: text.split(MARK) for roles, text in whole.items()}
    if any(len(found) != len(roles) + 1 for roles, found in parts.items()):
        raise ValueError
    opened, user_assistant, assistant_user, *_, end = parts["user", "assistant", "user", "assistant", "user"]
    twice = parts.get(("user", "user"), ["", end, end])[1]
    user_after = _common_beginning(user_assistant, twice, end)
    again = twice.removeprefix(user_after) if ("user", "user") in parts else opened
    user_before = _common_end(again, assistant_user, opened)
    around = {
        "user": (user_before, user_after),
        "assistant": (user_assistant.removeprefix(user_after), assistant_user.removesuffix(user_before)),
    }
    opening, prompt = opened.removesuffix(user_before), end.removeprefix(user_after)
    if ("system", "user") not in parts:
        return Turns(opening, "", around, prompt)
    before, between, _ = parts["system", "user"]
    shared = _common_beginning(opening, before)
    around["system"] = before.removeprefix(shared), between.removesuffix(user_before)
    return Turns(shared, opening.removeprefix(shared), around, prompt)


def _common_end(*texts: str) -> str:
    return _common_beginning(*(text[::-1] for text in texts))[::-1]


def _common_beginning(*texts: str) -> str:
    first = min(texts, key=len)
    return next((first[:n] for n in range(len(first), 0, -1) if all(t.startswith(first[:n]) for t in texts)), "")


def _rendered(tokenizer: Any, roles: Sequence[str], begun: str, says: Sequence[str] = ()) -> str | None:
    """What the template makes of a conversation, without a beginning; None where it refuses to."""
    texts = says or [MARK] * len(roles)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        return None
    return str(text).removeprefix(begun)


def _begins(tokenizer: Any) -> str:
    """The token that the tokenizer puts before every text, as text."""
    ids = list(tokenizer("a")["input_ids"])
    return str(tokenizer.bos_token) if ids[:1] == [tokenizer.bos_token_id] else ""


def _generation(folder: Path) -> GenerationConfig:
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(load_config(folder))


def _stops(tokenizer: Any, generation: GenerationConfig) -> list[str]:
    """The tokens that end an answer, as text."""
    own = generation.eos_token_id
    listed = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return [str(tokenizer.convert_ids_to_tokens(one)) for one in dict.fromkeys(listed) if one is not None]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
