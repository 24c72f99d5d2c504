"""A GGUF file behind a port: llama.cpp's own server, which the package xllamacpp runs in this process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ServingError
from ..files import existing

BINDING = "xllamacpp"


@contextmanager
def serving(file: str | Path, context: int) -> Iterator[tuple[str, str]]:
    """Serve a file on a free port of this machine. Gives the URL and which llama.cpp it is.

    Args:
        file: a model in GGUF.
        context: tokens of the longest prompt with its answer.

    Raises:
        DataError: there is no such file.
        ServingError: the binding is not installed, or cannot load the file.
    """
    path = existing(file)
    try:
        binding = importlib.import_module(BINDING)
    except ImportError as error:
        raise ServingError(
            f"--gguf runs the file in llama.cpp, through the package {BINDING}, which cannot be imported ({error}). "
            "Install the extra `gguf` (pip install 'peft-moe-delta[gguf]'), or start a server of llama.cpp yourself "
            "and give its --url."
        ) from error
    try:
        server = binding.Server(_parameters(binding, path, context))
    except RuntimeError as error:
        raise ServingError(f"llama.cpp cannot load {path}: {error}") from error
    try:
        yield server.listening_address, f"llama.cpp in {BINDING} {binding.__version__}"
    finally:
        del server  # stops it


def _parameters(binding: Any, path: Path, context: int) -> Any:
    """One request at a time, and attention in f32 all through: the file's own rounding is what is to be seen."""
    parameters = binding.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.verbosity = context, 1, 0, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.cache_type_k = parameters.cache_type_v = binding.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = binding.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds queries
    return parameters
