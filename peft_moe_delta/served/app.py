"""The HTTP side of `peft-moe-delta serve`: OpenAI's paths, streams and errors over a `Service`.

transformers' own server (`transformers serve`) cannot carry this: it answers requests one at a time unless its
continuous batching runs, which passes nothing of a request but its tokens to the model, so no language; it refuses
`echo` and `logprobs`, puts no bound on what waits, and answers errors in a shape of its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..kinds import did_you_mean
from ..program import NAME, VERSION
from .requests import ChatRequest, CompletionRequest, TokenizeRequest
from .responses import error
from .service import Answers, Refused, Service


def application(service: Service) -> FastAPI:
    """The server's paths."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.batches.close()

    app = FastAPI(title=NAME, version=VERSION, lifespan=running)
    app.add_middleware(BodyLimit, most=service.limits.bytes)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Refused, _refused)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        languages = {"languages": list(service.hosted.codes), "auto": service.hosted.reads}
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": NAME, **languages}
        return {"object": "list", "data": [model]}

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        tokens = await service.tokens(request)
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest) -> JSONResponse | StreamingResponse:
        return await _answered(service, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> JSONResponse | StreamingResponse:
        return await _answered(service, request)

    return app


async def _answered(service: Service, request: CompletionRequest | ChatRequest) -> JSONResponse | StreamingResponse:
    answers = await service.begin(request)
    if not request.stream:
        return JSONResponse(answers.shape.whole(await answers.all()))
    usage = request.stream_options is not None and request.stream_options.include_usage
    return StreamingResponse(_events(answers, usage), media_type="text/event-stream")


async def _events(answers: Answers, usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The status has been sent by then, so an error is an event of its own."""
    shape = answers.shape
    for chunk in shape.begin(answers.choices):
        yield _event(chunk)
    try:
        async with aclosing(answers.pieces()) as pieces:
            async for choice, piece in pieces:
                yield _event(shape.chunk(choice, piece))
    except Refused as refusal:
        yield _event(_error(refusal))
        return
    if usage:
        yield _event(shape.end(answers.choices))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class BodyLimit:
    """Refuses bodies of too many bytes, announced or not, before they are in memory."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"The request is larger than {self.most} bytes.")
            return message

        await self.app(scope, counted, send)


def _error(refusal: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return error(str(refusal), kind=kind, field=refusal.field, code=refusal.code)


async def _refused(_: Request, refusal: Any) -> JSONResponse:
    headers = {"Retry-After": "1"} if refusal.status == 503 else None
    return JSONResponse(_error(refusal), refusal.status, headers)


async def _http(_: Request, failure: Any) -> JSONResponse:
    """No such path or method, or a body that is too large."""
    return JSONResponse(error(str(failure.detail)), failure.status_code, failure.headers)


async def _malformed(_: Request, failure: Any) -> JSONResponse:
    """A body that is no JSON, or has a wrong field: the first fault of it."""
    first = failure.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return JSONResponse(error(f"The body is not valid JSON: {first['ctx']['error']}."), 400)
    field = place[0] if place else None
    if first["type"] == "extra_forbidden":
        known = _known(failure.body)
        message = f"Unknown or unsupported field {'.'.join(place)!r}.{did_you_mean(place[-1:], known)}"
    else:
        message = f"{'.'.join(place) or 'body'}: {first['msg']}"
    return JSONResponse(error(message, field=field), 400)


def _known(body: Any) -> Iterable[str]:
    """The fields of the kind of request that a body looks like."""
    chat = isinstance(body, dict) and "messages" in body
    return (ChatRequest if chat else CompletionRequest).model_fields
