"""Pico models behind a port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from builders import upcycle
from greek import ENGLISH, GREEK
from peft_moe_delta import fit_identifier
from peft_moe_delta.evaluation.loading import load
from served.pico_export import export, pico_model, with_tokenizer

HUNGARIAN = ["a macska és a kutya a házban van", "a kutya és a macska együtt ülnek a házban"] * 3
FINNISH = ["kissa ja koira ovat talossa yhdessä", "koira istuu talossa ja kissa nukkuu"] * 3
LANGUAGES = {"hu": "uralic", "en": "original", "fi": "uralic", "el": "hellenic"}


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A dense export's folder."""
    return export(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """An adapter routed by language, which can also read it from the text: folders of base and adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    base = pico_model()
    base.save_pretrained(folder / "base")
    with_tokenizer(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    model = upcycle(base, trained=True, routing="language", languages=LANGUAGES, experts={"uralic": 2, "hellenic": 1})
    loaded = load((model, load(folder / "base").tokenizer))
    texts = {"en": ENGLISH, "el": GREEK, "hu": HUNGARIAN, "fi": FINNISH}
    fit_identifier(model, texts, loaded.tokenizer, memory=8)
    model.save_pretrained(folder / "adapter")
    return SimpleNamespace(base=folder / "base", folder=folder / "adapter")


@contextmanager
def running(source, **limits) -> Iterator[SimpleNamespace]:
    """Our own server over a folder, in a thread: its URL, service and model."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from peft_moe_delta.served.app import application
    from peft_moe_delta.served.hosted import Hosted
    from peft_moe_delta.served.service import Limits, Service

    service = Service(Hosted(load(source)), "pico", Limits(**{"max_tokens": 24, "max_prompt_tokens": 128, **limits}))
    server = uvicorn.Server(uvicorn.Config(application(service), port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", service=service, hosted=service.hosted)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def server(adapter):
    """The adapter, served."""
    with running(adapter.folder) as found:
        yield found


@pytest.fixture(scope="session")
def dense_server(dense):
    """The dense export, served."""
    with running(dense, max_prompt_tokens=300) as found:
        yield found
