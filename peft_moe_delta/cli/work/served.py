"""`verify-served`, carried out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

from ...files import write_text
from ...served.client import Server
from ...served.compare import Comparison, compare
from ...served.gguf import serving
from ...served.prompts import prompts_of
from ...served.reference import Reference
from ..failure import CheckFailed
from ..options import pairs_of


def verify_served(arguments: Namespace) -> str:
    prompts = prompts_of(pairs_of("--text", arguments.text))
    reference = Reference(
        arguments.export,
        language=arguments.language,
        tolerance=arguments.tolerance,
        trust_remote_code=arguments.trust_remote_code,
    )
    with _server(arguments) as (server, version):
        found = compare(
            reference,
            server,
            prompts,
            max_tokens=arguments.max_tokens,
            max_prompt_tokens=arguments.max_prompt_tokens,
            progress=partial(tqdm, desc="languages", leave=False),
        )
        comparison = Comparison(
            arguments.export,
            arguments.url or arguments.gguf,
            version,
            reference.tolerance,
            arguments.max_tokens,
            tuple(found),
        )
    if arguments.json is not None:
        write_text(arguments.json, comparison.json())
    if not comparison.agrees:
        raise CheckFailed(comparison.table())
    return comparison.table()


@contextmanager
def _server(arguments: Namespace) -> Iterator[tuple[Server, str | None]]:
    """Who is asked, and its version."""
    if arguments.gguf is None:
        server = Server(arguments.url, arguments.model, language=arguments.language, timeout=arguments.timeout)
        yield server, server.version()
        return
    context = 2 * arguments.max_prompt_tokens + arguments.max_tokens  # conversations are given whole
    with serving(arguments.gguf, context) as (url, version):
        yield Server(url, arguments.model, timeout=arguments.timeout), version
