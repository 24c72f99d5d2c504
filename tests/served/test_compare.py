"""`verify-served` agrees with a server that is right, finds each fault of one that is not, and never takes for
agreement what a server does not say."""

from __future__ import annotations

import json
import math
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from peft_moe_delta.cli import main
from peft_moe_delta.errors import ServingError
from peft_moe_delta.served.client import NotOffered, Reply, Server
from peft_moe_delta.served.compare import (
    AGREES,
    DIFFERS,
    NOT_OFFERED,
    Comparison,
    Finding,
    _same_certainty,
    _same_numbers,
    _same_text,
    compare,
)
from peft_moe_delta.served.prompts import SENTENCES, Prompt, prompts_of
from peft_moe_delta.served.reference import Answer, Reference

PROMPTS = [Prompt("en", "the cat sat"), Prompt("el", "η γάτα")]


@pytest.fixture(scope="module")
def reference(dense):
    """Asked the same again and again, it answers from memory."""
    found = Reference(str(dense))
    cached = lru_cache(lambda prompt, number: Reference.answer(found, prompt, number))
    found.answer = lambda prompt, number: cached(tuple(prompt), number)
    return found


class Told(Server):
    """A server that answers as the export does, but for what is planted. Nobody is asked over HTTP."""

    def __init__(self, reference, **planted):
        self.reference, self.planted = reference, planted

    def answer(self, name, value):
        change = self.planted.get(name, lambda value: value)
        return change(value)

    def tokens(self, text):
        return self.answer("tokens", self.reference.ids_of(text))

    def prompt_logprobs(self, prompt):
        return self.answer("prompt_logprobs", list(self.reference.answer(prompt, 1).prompt_logprobs))

    def complete(self, prompt, max_tokens):
        found = self.reference.answer(prompt, max_tokens)
        text = self.reference.text_of(found.ids, prompt)
        return self.answer("complete", Reply(text, found.ids, found.logprobs, len(prompt)))

    def chat(self, messages, max_tokens):
        ids = self.reference.ids_of_chat(messages)
        return self.answer("chat", replace(self.complete(ids, max_tokens), prompt_tokens=len(ids)))


def refuse(value):
    raise NotOffered("not here")


def outcomes(reference, **planted):
    found = compare(reference, Told(reference, **planted), PROMPTS, max_tokens=4)
    return {(finding.check, finding.language): finding.outcome for finding in found}


def test_the_same_answers_agree(reference):
    assert set(outcomes(reference).values()) == {AGREES}


@pytest.mark.parametrize(
    ("name", "change", "check", "outcome"),
    [
        ("tokens", lambda ids: [1, *ids], "token ids", DIFFERS),
        ("tokens", refuse, "token ids", NOT_OFFERED),
        ("prompt_logprobs", lambda known: [*known[:-1], known[-1] + 0.002], "prompt log-probabilities", DIFFERS),
        ("prompt_logprobs", lambda known: [math.nan, *known[1:]], "prompt log-probabilities", DIFFERS),
        ("prompt_logprobs", lambda known: [known[0] + 0.0005, *known[1:]], "prompt log-probabilities", AGREES),
        ("prompt_logprobs", refuse, "prompt log-probabilities", NOT_OFFERED),
        ("complete", lambda r: replace(r, text="z" + r.text), "greedy text", DIFFERS),
        ("complete", lambda r: replace(r, text=r.text + "q", ids=None), "greedy text", DIFFERS),
        ("complete", lambda r: replace(r, ids=(*r.ids[:2], r.ids[2] ^ 1, *r.ids[3:])), "greedy text", DIFFERS),
        ("complete", lambda r: replace(r, ids=r.ids[:3]), "greedy text", DIFFERS),
        ("complete", lambda r: replace(r, ids=None), "greedy text", AGREES),
        ("complete", lambda r: replace(r, logprobs=None), "greedy log-probabilities", NOT_OFFERED),
        ("complete", lambda r: replace(r, logprobs=(math.nan,) * 4), "greedy log-probabilities", DIFFERS),
        ("complete", lambda r: replace(r, logprobs=()), "greedy log-probabilities", NOT_OFFERED),
        ("chat", lambda r: replace(r, prompt_tokens=r.prompt_tokens + 1), "chat prompt", DIFFERS),
        ("chat", lambda r: replace(r, prompt_tokens=None), "chat prompt", NOT_OFFERED),
        ("chat", lambda r: replace(r, text="no"), "chat text", DIFFERS),
        ("chat", refuse, "chat text", NOT_OFFERED),
    ],
)  # fmt: skip
def test_each_fault_is_found_and_silence_is_no_agreement(reference, name, change, check, outcome):
    found = outcomes(reference, **{name: change})
    assert {found[check, code] for code in ("en", "el")} == {outcome}


def answered(reference, text, *near):
    """An answer, and the tokens besides its own that are as good at each place."""
    ids = reference.ids_of(text)
    others = [frozenset(reference.ids_of(other)[:1]) if other else frozenset() for other in near]
    ties = tuple(
        frozenset({own}) | other for own, other in zip([*ids, 2], [*others, *[frozenset()] * 99], strict=False)
    )
    return Answer((4, 5), (-1.0,), tuple(ids), (-2.0,) * len(ids), ties)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("near", "agrees"), [((), False), (("d",), False), (("", "d"), True), (("", "", "d"), False)]
)  # fmt: skip
def test_a_near_tie_may_fall_either_way_and_nothing_else(reference, told, near, agrees):
    answer = answered(reference, "catz", *near)
    ids = tuple(reference.ids_of("cat")) + tuple(reference.ids_of("dz"))
    assert len(reference.ids_of("cat")) == 1
    found, _, detail = _same_text(reference, answer, Reply("catdz", ids if told else None, None, None))
    assert found is agrees and ("near-tie of the export falls otherwise at token 1" in detail) is agrees


@pytest.mark.parametrize(
    ("theirs", "agrees"),
    [
        ("cat\N{REPLACEMENT CHARACTER}", True),
        ("cat\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}", True),
        ("cat", True),
        ("ca", False),
    ],
)
def test_a_last_character_that_is_not_all_there_may_be_left_out(reference, theirs, agrees):
    answer = answered(reference, "catη")
    cut = replace(answer, ids=answer.ids[:-1])  # a Greek letter is two bytes, and two tokens
    assert _same_text(reference, cut, Reply(theirs, None, None, None))[0] is agrees


@pytest.mark.parametrize("told", [True, False])
def test_an_answer_that_ends_early_differs_unless_its_end_is_as_near(reference, told):
    answer = answered(reference, "catz")
    early = Reply("cat", tuple(reference.ids_of("cat")) if told else None, None, None)
    assert _same_text(reference, answer, early)[0] is False
    tie = replace(answer, near=(answer.near[0], answer.near[1] | {2}, *answer.near[2:]))
    assert _same_text(reference, tie, early)[0] is True


def test_certainty_is_compared_up_to_where_the_answers_part(reference):
    answer = answered(reference, "catz")
    ids = tuple(reference.ids_of("cat") + reference.ids_of("d"))
    assert _same_certainty(reference, answer, Reply("catd", ids, (-2.0, -9.0), None))[0] is True
    with pytest.raises(NotOffered):
        _same_certainty(reference, answer, Reply("d", tuple(reference.ids_of("d")), (-2.0,), None))


def test_nothing_compared_is_no_agreement():
    empty = Comparison("e", "s", None, 0.1, 4, (Finding("token ids", "en", NOT_OFFERED),))
    assert not empty.agrees and not replace(empty, findings=()).agrees
    with pytest.raises(NotOffered):
        _same_numbers(None, [], [], [])


def test_prompts_are_the_users_or_built_in(tmp_path):
    (tmp_path / "hu.jsonl").write_text('{"text": "egy"}\n{"text": "kettő"}\n', encoding="utf-8")
    assert prompts_of({"hu": tmp_path / "hu.jsonl"}) == [Prompt("hu", "egy")]
    assert [prompt.language for prompt in prompts_of({})] == list(SENTENCES)


@contextmanager
def scripted(answers):
    """A server that answers as it is told: path -> what a body gives, with its status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            status, found = answers.get(self.path, lambda body: (404, {"error": "no such path"}))(body)
            sent = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}/v1/", "m")
    finally:
        server.shutdown()
        server.server_close()


def completion(**choice):
    return 200, {"choices": [{"text": "x", **choice}], "usage": {"prompt_tokens": 3}}


def test_vllms_prompt_log_probabilities_are_read():
    def answer(body):
        if body.get("echo"):
            return 400, {"error": "no echo"}
        rows = [None, {"5": {"logprob": -1.5}, "9": {"logprob": -0.1}}, {"7": {"logprob": -2.0}}]
        return completion(prompt_logprobs=rows)

    with scripted({"/v1/completions": answer, "/version": lambda _: (200, {"version": "0.32"})}) as server:
        assert server.prompt_logprobs([3, 5, 7]) == [-1.5, -2.0] and server.version() == "0.32"


def test_llama_cpps_log_probabilities_are_asked_one_token_at_a_time():
    def answer(body):
        if body.get("echo"):
            return 400, {"error": "Only no echo is supported"}
        wanted = body["logit_bias"][0][0] if "logit_bias" in body else 8
        content = [{"id": wanted, "token": "", "logprob": -float(len(body["prompt"]))}]
        return completion(logprobs={"content": content})

    with scripted({"/v1/completions": answer, "/props": lambda _: (200, {"build_info": "b1"})}) as server:
        assert server.prompt_logprobs([3, 5, 7]) == [-1.0, -2.0] and server.version() == "b1"
        assert server.complete([3, 5], 1) == Reply("x", (8,), (-2.0,), 3)


def test_tokens_that_a_server_leaves_out_of_its_list_are_not_taken_for_others(reference):
    content = [{"id": 8, "token": "x", "logprob": -1.0}]

    def answer(body):
        status, found = completion(
            logprobs={"content": content if body["prompt"] != [3] else []}, finish_reason="length"
        )
        return status, {**found, "usage": {"prompt_tokens": 2, "completion_tokens": 2}}

    with scripted({"/v1/completions": answer, "/props": lambda _: (200, {})}) as server:
        assert server.complete([3, 5], 2) == Reply("x", None, None, 2)
        assert server.prompt_logprobs([3, 5, 8]) == [None, -1.0]
    agrees, difference, detail = _same_numbers(reference, [5, 8], [-7.0, -1.0], [None, -1.0])
    assert agrees and difference == 0 and detail == "1 of 2 tokens are not told"


def test_what_a_server_does_not_offer_says_how_it_declined():
    with scripted({"/v1/completions": lambda _: completion(logprobs=None)}) as server:
        assert server.complete([3], 1) == Reply("x", None, None, 3)
        with pytest.raises(NotOffered, match=r"no log-probabilities.*no prompt_logprobs.*/props: status 404"):
            server.prompt_logprobs([3, 5])
        with pytest.raises(NotOffered, match="/tokenize: status 404: .*no such path"):
            server.tokens("a")
        assert server.version() is None


def test_a_server_that_fails_or_is_gone_is_an_error():
    with scripted({"/v1/completions": lambda _: (500, {"error": "out of memory"})}) as server:
        with pytest.raises(ServingError, match="status 500.*out of memory"):
            server.complete([3], 1)
        with pytest.raises(ServingError, match="lists no models"):
            Server(server.root)
    with pytest.raises(ServingError, match="no answer"):
        server.complete([3], 1)


def test_without_the_binding_a_gguf_file_is_refused_with_the_extra(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        main(["verify-served", str(dense), "--gguf", str(tmp_path / "m.gguf")])
    assert stopped.value.code == 1 and "pip install 'peft-moe-delta[gguf]'" in capsys.readouterr().err


@pytest.mark.slow
def test_llama_cpp_agrees_with_a_gguf_file_of_the_export(dense, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    from served.pico_export import export, to_gguf

    line = ["verify-served", str(dense), "--gguf"]
    main([*line, str(to_gguf(dense, tmp_path / "same.gguf")), "--tolerance", "2e-5"])
    assert "agrees with" in capsys.readouterr().out
    other = to_gguf(export(tmp_path / "other", seed=1), tmp_path / "other.gguf")
    with pytest.raises(SystemExit):
        main([*line, str(other), "--max-tokens", "4"])
    assert "does not agree" in capsys.readouterr().out


def test_space_that_is_a_token_is_seen_where_the_server_tells_no_tokens(reference):
    answer = answered(reference, "cat  d", "")
    ids = reference.ids_of("cat  d")
    assert len(ids) > 2 and reference.tokenizer.decode(ids[:2]) == "cat "
    tie = replace(answer, near=(answer.near[0], answer.near[1] | set(reference.ids_of("z")), *answer.near[2:]))
    assert _same_text(reference, tie, Reply("catzd", None, None, None))[0] is True
    assert _same_text(reference, answer, Reply("catzd", None, None, None))[0] is False


def test_a_nearer_token_may_begin_as_the_exports_does(reference):
    [space, the] = reference.ids_of(" ")[:1], reference.ids_of(" the")
    assert len(the) == 1 and the != space
    answer = answered(reference, "cat", "", "")
    answer = replace(
        answer, ids=(*answer.ids, *space, *space), near=(answer.near[0], frozenset({*space, *the}), frozenset(space))
    )
    assert _same_text(reference, answer, Reply("cat the", None, None, None))[0] is True
    only = replace(answer, near=(answer.near[0], frozenset(space), frozenset(space)))
    assert _same_text(reference, only, Reply("cat the", None, None, None))[0] is False
