"""A loopback Hub, a process that uses it, and the models that go there."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from builders import perturbed, upcycle
from hub import client
from hub.loopback import WRITER, LoopbackHub
from recipe.pico_recipe import pico_model, pico_tokenizer

Call = Callable[..., Any]


@pytest.fixture(scope="session")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="session")
def hub_environment(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process needs to take the loopback Hub for the Hub, set before it imports huggingface_hub."""
    home = tmp_path_factory.mktemp("hf_home")
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture(scope="session")
def call(hub_environment: dict[str, str]) -> Iterator[Call]:
    """Runs a function of `client.py` in one process of its own, and returns its result or raises its error."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub_environment.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(client.ready).result()
    assert os.environ.get("HF_ENDPOINT") != hub_environment["HF_ENDPOINT"]
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(autouse=True)
def in_order(hub: LoopbackHub) -> None:
    """Nothing of an earlier test's faults and requests is left."""
    hub.faults.clear()
    hub.requests.clear()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: base, post_trained, adapter, and what grafting makes of them: grafted, stock."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("base", "post_trained", "adapter", "grafted", "stock")}
    base = pico_model()
    for name, model in (("base", base), ("post_trained", perturbed(base, scale=0.05))):
        model.save_pretrained(folders[name])
        pico_tokenizer().save_pretrained(folders[name])
    upcycled = upcycle(client.load(folders["base"]), trained=True)
    upcycled.save_pretrained(folders["adapter"])
    upcycled.graft(folders["post_trained"]).save_pretrained(folders["grafted"])
    upcycled.merge_and_graft(folders["post_trained"]).save_pretrained(folders["stock"])
    tokenizer = AutoTokenizer.from_pretrained(folders["post_trained"])
    for name in ("grafted", "stock"):
        tokenizer.save_pretrained(folders[name])
    return folders
