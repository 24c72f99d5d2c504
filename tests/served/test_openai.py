"""OpenAI's own client against `peft-moe-delta serve`, and against a GGUF file of the same export in llama.cpp.

The client is no dependency: `make test-served` fetches it, and elsewhere these tests skip.
"""

from __future__ import annotations

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai

from peft_moe_delta.cli import main
from peft_moe_delta.served.convert import cached
from peft_moe_delta.served.gguf import serving
from served.conftest import running
from served.forms import make
from served.test_serve import MESSAGES, TEXTS, single

LANGUAGE = {"extra_body": {"language": "hu"}}


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


@pytest.fixture
def client(server):
    with client_of(server.url) as found:
        yield found


def test_a_conversation_streamed_and_not(client, server):
    asked = {"model": "pico", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, **LANGUAGE}
    answer = client.chat.completions.create(**asked)
    expected = single(server.hosted, "<user> the cat\n<assistant>", "hu")
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    assert answer.usage.completion_tokens == 8 and answer.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected and chunks[-1].usage == answer.usage


def test_a_text_with_log_probabilities(client):
    asked = {"model": "pico", "prompt": TEXTS[0], "max_tokens": 2, "echo": True, "logprobs": 2, "temperature": 0}
    choice = client.completions.create(**asked, **LANGUAGE).choices[0]
    assert choice.text.startswith(TEXTS[0]) and choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens)


def test_models_and_errors_are_the_clients(client):
    assert [model.id for model in client.models.list()] == ["pico"]
    asked = {"messages": MESSAGES, "max_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="This model chooses experts by language"):
        client.chat.completions.create(model="pico", **asked)
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
        client.chat.completions.create(model="other", **asked, **LANGUAGE)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="pico", **asked, tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.slow
def test_one_export_answers_alike_as_a_gguf_file_and_served_by_us(tmp_path):
    pytest.importorskip("xllamacpp")
    if not cached().is_dir():
        pytest.skip(f"no llama.cpp sources in {cached()}; make test-served fetches them")
    export = make("Mixtral", tmp_path / "mixtral")
    main(["gguf", str(export), str(tmp_path), "--outtype", "f32", "--pre-tokenizer", "gpt-2"])
    answers = []
    with running(export) as ours, serving(tmp_path / "mixtral-f32.gguf", 512) as (url, _):
        for place in (ours.url, url):
            with client_of(place) as client:
                name = next(iter(client.models.list())).id
                for text in ("the cat sat", "on the mat"):
                    message = {"role": "user", "content": text}
                    asked = {"model": name, "messages": [message], "max_tokens": 8, "temperature": 0}
                    answers.append(client.chat.completions.create(**asked).choices[0].message.content.strip())
    assert answers[:2] == answers[2:]
