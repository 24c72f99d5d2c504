"""`serve`, carried out. A module of its own, as the extra `serve` need not be installed for `verify-served`."""

from __future__ import annotations

import logging
from argparse import Namespace

import uvicorn

from ...evaluation.loading import load
from ...served.app import application
from ...served.hosted import Hosted
from ...served.service import Limits, Service

log = logging.getLogger(__name__)


def serve(arguments: Namespace) -> str:
    """Until Ctrl-C or SIGTERM."""
    hosted = Hosted(load(arguments.model, trust_remote_code=arguments.trust_remote_code))
    limits = Limits(
        max_tokens=arguments.max_tokens,
        max_prompt_tokens=arguments.max_prompt_tokens,
        batch_size=arguments.batch_size,
        waiting=arguments.queue,
        timeout=arguments.timeout,
    )
    service = Service(hosted, arguments.name or arguments.model, limits)
    if arguments.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("Whoever reaches %s may ask: the server knows no passwords.", arguments.host)
    uvicorn.run(application(service), host=arguments.host, port=arguments.port, timeout_graceful_shutdown=5)
    return f"{service.name} is no longer served"
