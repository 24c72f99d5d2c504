"""`peft-moe-delta serve`: answers in a batch of several languages are those of single calls, streams are the answers,
and what cannot be answered is refused in OpenAI's words."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from peft import PeftModel
from transformers import AutoModelForCausalLM

import ask_server
from builders import upcycle
from peft_moe_delta.evaluation.loading import load
from peft_moe_delta.served.answer import Job, Row, Sampling
from peft_moe_delta.served.batches import answer
from peft_moe_delta.served.hosted import Hosted
from served.conftest import running

ROOT = Path(__file__).parents[2]
TEXTS = ["the cat sat on the mat", "η γάτα", "on the cat and the dog sat", "ő"]
CODES = ["en", "el", "hu", "fi"]
MESSAGES = [{"role": "user", "content": "the cat"}]


def ask(server, path="/v1/completions", **body):
    return requests.post(server.url + path, json=body, timeout=600)


def single(hosted, prompt, language, number=8, text=True):
    """What one plain call of `generate` writes."""
    model, tokenizer = hosted.model, hosted.tokenizer
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    options = {} if language is None else {"language": language}
    inputs = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=number, do_sample=False,
            eos_token_id=hosted.ends, pad_token_id=0, **options,
        )[0].tolist()  # fmt: skip
    new = [token for token in out[len(ids) :] if token not in hosted.ends]
    return tokenizer.decode(out, skip_special_tokens=True)[len(tokenizer.decode(ids)) :] if text else new


def streamed(response):
    """The events of a stream, and whether it ended as it should."""
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(event) for event in events if event != "[DONE]"], events[-1] == "[DONE]"


def test_a_batch_of_several_languages_and_lengths_equals_single_calls(server):
    hosted, pieces = server.hosted, {}
    jobs = [
        Job(
            tuple(hosted.tokenizer(text)["input_ids"]), code, number,
            deliver=pieces.setdefault(code, []).append, sampling=Sampling(temperature=0),
        )
        for text, code, number in zip(TEXTS, CODES, (8, 3, 12, 5), strict=True)
    ]  # fmt: skip
    answer(hosted, server.service.batches.tokenizer, jobs)
    for job, text in zip(jobs, TEXTS, strict=True):
        written = [token.id for piece in pieces[job.language] for token in piece.tokens]
        assert written == single(hosted, text, job.language, job.max_tokens, text=False)
        assert "".join(piece.text for piece in pieces[job.language]) == single(
            hosted, text, job.language, job.max_tokens
        )
    assert len({single(hosted, TEXTS[0], code) for code in CODES}) > 1  # languages do differ


def test_requests_at_the_same_time_equal_single_calls(server):
    asked = [(text, code) for text in TEXTS[:3] for code in ("el", "hu", "auto")]

    def one(question):
        text, code = question
        found = ask(server, prompt=text, language=code, max_tokens=4, temperature=0, return_token_ids=True).json()
        return found["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, asked))
    assert found == [single(server.hosted, text, code, 4, text=False) for text, code in asked]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": TEXTS[0], "logprobs": 2, "echo": True}),
        ("/v1/completions", {"prompt": TEXTS, "max_tokens": 9}),
        ("/v1/completions", {"prompt": TEXTS[2], "stop": ["t", "aaaa"]}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 7}),
        ("/v1/completions", {"prompt": "the", "temperature": 1.5, "top_p": 0.9, "seed": 3}),
    ],
)
def test_a_stream_is_the_answer_piece_by_piece(server, path, body):
    body = {"language": "el", "temperature": 0, "return_token_ids": True, **body}
    whole = ask(server, path, **body).json()
    events, ended = streamed(ask(server, path, **body, stream=True, stream_options={"include_usage": True}))
    assert ended and events[-1]["usage"] == whole["usage"] and len(events) > 3
    for choice in whole["choices"]:
        pieces = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == choice["index"]]
        texts = [piece["delta"].get("content", "") if "delta" in piece else piece["text"] for piece in pieces]
        assert "".join(texts) == (choice["message"]["content"] if "message" in choice else choice["text"])
        assert [one for piece in pieces for one in piece.get("token_ids", [])] == choice["token_ids"]
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
        if choice.get("logprobs"):
            told = [one for piece in pieces for one in piece["logprobs"]["token_logprobs"]]
            assert told == choice["logprobs"]["token_logprobs"]


def test_a_conversation_goes_through_the_template(server):
    found = ask(server, "/v1/chat/completions", messages=MESSAGES, language="hu", max_tokens=8, temperature=0).json()
    assert found["choices"][0]["message"]["content"] == single(server.hosted, "<user> the cat\n<assistant>", "hu")
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}]
    again = ask(server, "/v1/chat/completions", messages=parts, language="hu", max_tokens=8, temperature=0).json()
    assert again["choices"][0]["message"] == found["choices"][0]["message"]


@pytest.mark.parametrize("language", ["en", "hu"])
def test_a_prompts_log_probabilities_are_the_models(server, language):
    ids = server.hosted.tokenizer(TEXTS[0])["input_ids"]
    found = ask(server, prompt=ids, language=language, max_tokens=0, echo=True, logprobs=3).json()["choices"][0]
    inputs = torch.tensor([ids])
    with torch.no_grad():
        logprobs = server.hosted.model(inputs, language=language).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(-1, inputs[0, 1:, None])[:, 0]
    told = found["logprobs"]
    assert told["token_logprobs"][0] is None and found["text"] == TEXTS[0] == "".join(told["tokens"])
    torch.testing.assert_close(torch.tensor(told["token_logprobs"][1:]), expected)
    assert max(told["top_logprobs"][1].values()) == pytest.approx(logprobs[0].max().item(), abs=1e-5)


def test_an_answer_ends_before_a_stop_text(server):
    whole = ask(server, prompt=TEXTS[0], language="en", max_tokens=24, temperature=0).json()["choices"][0]
    stop = whole["text"][5:8]
    cut = ask(server, prompt=TEXTS[0], language="en", max_tokens=24, temperature=0, stop=stop).json()["choices"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["finish_reason"] == "stop"


def test_text_that_may_begin_a_stop_text_is_held_back_until_it_does_not(server):
    pieces, tokenizer = [], server.hosted.tokenizer
    row = Row(Job((3,), "en", 99, deliver=pieces.append, stop=("abcd",)), tokenizer, [2])
    for token in tokenizer("xabcabcdy")["input_ids"]:
        if not row.done:
            row.take(token, None)
    assert "".join(piece.text for piece in pieces) == "xabc" and pieces[-1].finish == "stop"
    assert all(not "abcd".startswith(piece.text[-1:]) or "xabc".endswith(piece.text) for piece in pieces if piece.text)


def test_a_seed_gives_the_same_answer_alone_and_among_others(server):
    body = {"prompt": "the cat", "language": "en", "temperature": 2.0, "seed": 5, "max_tokens": 12}
    alone = ask(server, **body).json()["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        texts = list(
            pool.map(lambda seed: ask(server, **{**body, "seed": seed}).json()["choices"][0]["text"], [5, 6, 5, 7])
        )
    assert texts[0] == texts[2] == alone and len(set(texts)) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"prompt": "a", "language": "xx"}, 400, "Unknown language 'xx'; this model knows hu, en"),
        ("/v1/completions", {"prompt": "a"}, 400, 'expected one of hu, en, fi, el or "auto"'),
        ("/v1/completions", {"prompt": "a", "language": "en", "model": "gpt"}, 404, "no model 'gpt' here, only 'pico'"),
        ("/v1/completions", {"language": "en"}, 400, "prompt: Field required"),
        ("/v1/completions", {"prompt": "a", "langauge": "en"}, 400, "'langauge'. Did you mean language?"),
        ("/v1/completions", {"prompt": "a", "language": "en", "n": 2}, 400, "n: Input should be 1"),
        ("/v1/completions", {"prompt": "a", "language": "en", "max_tokens": 25}, 400, "writes at most 24"),
        ("/v1/completions", {"prompt": "a", "language": "en", "max_tokens": 0}, 400, "only makes sense with echo"),
        ("/v1/completions", {"prompt": "a", "language": "en", "temperature": 3}, 400, "temperature: "),
        ("/v1/completions", {"prompt": "cat " * 200, "language": "en"}, 400, "this server takes at most 128"),
        ("/v1/completions", {"prompt": "x" * 200_000, "language": "en"}, 413, "larger than"),
        ("/v1/completions", {"prompt": [5, 290], "language": "en"}, 400, "not from 0 to 289"),
        ("/v1/completions", {"prompt": "", "language": "en"}, 400, "no token"),
        ("/v1/completions", {"prompt": ["a"] * 129, "language": "en"}, 503, "queue is full"),
        ("/v1/chat/completions", {"messages": [], "language": "en"}, 400, "messages: "),
        ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role: "),
        ("/v1/chat/completions", {"messages": MESSAGES, "language": "en", "tools": []}, 400, "'tools'"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_shape(server, path, body, status, said):
    found = ask(server, path, **body)
    assert found.status_code == status
    error = found.json()["error"]
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_what_is_no_json_is_refused(server):
    found = requests.post(
        server.url + "/v1/completions", data="{'prompt'", headers={"content-type": "application/json"}, timeout=600
    )
    assert found.status_code == 400 and "not valid JSON" in found.json()["error"]["message"]


def test_an_answer_that_takes_too_long_is_given_up(adapter):
    with running(adapter.folder, timeout=1e-6) as hasty:
        found = ask(hasty, prompt="a", language="en")
        assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
        events, ended = streamed(ask(hasty, prompt="a", language="en", stream=True))
        assert "error" in events[-1] and not ended


def test_a_model_that_fails_is_an_error_and_the_next_request_is_answered(server, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(server.hosted, "ends", ["no number"])
        failed = ask(server, prompt="a", language="en", max_tokens=1)
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert ask(server, prompt="a", language="en", max_tokens=1).ok


def test_an_answer_that_nobody_waits_for_ends(server):
    pieces = []

    def hang_up(piece):
        pieces.append(piece)
        job.cancelled = True

    job = Job((4, 5), "en", 24, deliver=hang_up, sampling=Sampling(temperature=0))
    answer(server.hosted, server.service.batches.tokenizer, [job])
    assert len(pieces) == 1 and pieces[0].finish is None


def test_an_export_is_asked_without_a_language(dense_server):
    found = ask(dense_server, prompt=TEXTS[0], max_tokens=8, temperature=0).json()
    assert found["choices"][0]["text"] == single(dense_server.hosted, TEXTS[0], None)
    assert ask(dense_server, prompt="a", language="auto", max_tokens=1).ok
    assert "leave out" in ask(dense_server, prompt="a", language="hu").json()["error"]["message"]
    assert requests.get(dense_server.url + "/v1/models", timeout=600).json()["data"][0]["languages"] == []


@pytest.mark.parametrize("form", ["remote code", "learned"])
def test_other_forms_are_told_of_languages_as_they_take_them(adapter, form):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.base), adapter.folder).eval()
    tokenizer = load(adapter.base).tokenizer
    if form == "remote code":
        with pytest.warns(UserWarning, match="nothing to graft"):
            model = model.merge_and_graft(adapter.base, remote_code=True)
    else:
        model = upcycle(load(adapter.base).model, trained=True, routing="learned")
    hosted = Hosted(load((model, tokenizer)))
    codes = ["hu", "en", "hu"] if hosted.must_be_told else [hosted.resolved(code) for code in (None, "auto", None)]
    assert (form == "learned") is (not hosted.must_be_told)
    written = [[] for _ in codes]
    jobs = [
        Job(tuple(tokenizer(text)["input_ids"]), code, 6, deliver=pieces.append, sampling=Sampling(temperature=0))
        for text, code, pieces in zip(TEXTS, codes, written, strict=False)
    ]
    answer(hosted, tokenizer, jobs)
    for job, text, pieces in zip(jobs, TEXTS, written, strict=False):
        assert "".join(piece.text for piece in pieces) == single(hosted, text, job.language, 6)


def load_of(server, number):
    """So many requests of several languages at the same time, streamed and not; how many were wrong."""
    asked = [(TEXTS[i % 4], CODES[i // 4 % 4], 4 + i % 5, i % 3 == 0) for i in range(number)]
    expected = {key: single(server.hosted, key[0], key[1], key[2]) for key in {one[:3] for one in asked}}

    def right(question):
        text, code, tokens, stream = question
        found = ask(server, prompt=text, language=code, max_tokens=tokens, temperature=0, stream=stream)
        if stream:
            return "".join(e["choices"][0]["text"] for e in streamed(found)[0]) == expected[question[:3]]
        return found.json()["choices"][0]["text"] == expected[question[:3]]

    with ThreadPoolExecutor(16) as pool:
        return sum(not fine for fine in pool.map(right, asked))


def kept():
    gc.collect()
    return len(gc.get_objects()), threading.active_count()


@pytest.mark.slow
def test_load(server):
    assert load_of(server, 64) == 0
    load_of(server, 100)  # whatever is made once is there now
    objects, threads = kept()
    assert load_of(server, 500) == 0
    objects_after, threads_after = kept()
    assert threads_after <= threads and objects_after - objects < 500  # less than one a request


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_interrupted(adapter, sent):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "peft_moe_delta", "serve", str(adapter.folder), "--port", "0", "--name", "pico"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        for line in run.stderr:
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                break
        models = requests.get(found[1] + "/v1/models", timeout=600).json()["data"]
        assert models[0]["id"] == "pico" and models[0]["languages"] == ["hu", "en", "fi", "el"]
        answered = requests.post(
            found[1] + "/v1/completions", json={"prompt": "the", "language": "hu", "max_tokens": 2}, timeout=600
        )
        assert answered.ok
        run.send_signal(sent)
        out, _ = run.communicate(timeout=600)
    assert run.returncode == 0 and out == "pico is no longer served\n"


def test_the_example_asks_in_each_language(server, monkeypatch, capsys):
    questions = ["hu=a macska", "el=η γάτα", "en=the cat"]
    monkeypatch.setattr(sys, "argv", ["ask_server.py", *questions, "--url", server.url, "--max-tokens", "4"])
    ask_server.main()
    printed = capsys.readouterr().out
    assert re.findall(r"^(..): ", printed, re.MULTILINE) == ["hu", "el", "en"]
    monkeypatch.setattr(sys, "argv", ["ask_server.py", "=the cat", "--url", server.url])
    with pytest.raises(SystemExit, match="language"):
        ask_server.main()
