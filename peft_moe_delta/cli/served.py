"""`serve`: a model behind a port. `verify-served`: whether a server answers as an export does in plain transformers.
`gguf`: an export for llama.cpp and what runs it, compared in the same way."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from ..engines import GGUF_TYPES
from ..errors import ServingError
from .options import Command, new_file, new_folder


def at_least_one(text: str) -> int:
    """A whole number from 1 on; argparse calls it."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _add_serve_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="an adapter, a grafted adapter or an export: folder or Hub id")
    add(
        "--host",
        default="127.0.0.1",
        help="where to listen (127.0.0.1: this machine alone, as nobody is asked who they are)",
    )
    add("--port", type=int, default=8000, help="(8000)")
    add("--name", help="what clients call the model (default: as it is given here)")
    add("--max-tokens", type=at_least_one, default=512, help="most tokens of an answer, and the default (512)")
    add("--max-prompt-tokens", type=at_least_one, default=4096, help="most tokens of a prompt (4096)")
    add("--batch-size", type=at_least_one, default=8, help="most prompts answered at once (8)")
    add("--queue", type=at_least_one, default=128, help="most prompts that wait; more get status 503 (128)")
    add("--timeout", type=float, default=300.0, help="seconds from a request to the end of its answer (300)")
    add("--trust-remote-code", action="store_true", help="load an export of --target remote_code")


def _read_serve_arguments(arguments: Namespace) -> Namespace:
    """
    Raises:
        ServingError: the extra is not installed.
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ServingError(
            f"serve needs {' and '.join(missing)}, of the extra `serve`: pip install 'peft-moe-delta[serve]'."
        )
    return arguments


def _add_verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("export", help="the exported checkpoint, or an adapter: folder or Hub id")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--url", help="of a running OpenAI-compatible server, such as http://127.0.0.1:8000")
    asked.add_argument("--gguf", metavar="FILE", help="the export in GGUF, run in llama.cpp (extra `gguf`)")
    add = parser.add_argument
    add("--model", metavar="NAME", help="what the server calls it (default: the first that it lists)")
    add("--language", help="sent with every request, as `peft-moe-delta serve` takes it")
    _add_comparison(parser, "how far log-probabilities may be off (0.001; 0.1 for a 16-bit export)")
    add("--json", type=new_file, metavar="FILE", help="write every finding to a file")
    add("--record", action="store_true", help="where all agrees, say so in the export's served.json, for its card")
    add("--trust-remote-code", action="store_true", help="load an export of --target remote_code")


def _add_comparison(parser: ArgumentParser, tolerance: str) -> None:
    """What is asked of a server, and how much it may differ."""
    add = parser.add_argument
    add(
        "--text", metavar="LANGUAGE=FILE", action="append", default=[],
        help="jsonl with `text`, of which the first is asked (default: built-in sentences)",
    )  # fmt: skip
    add("--tolerance", type=float, help=tolerance)
    add("--max-tokens", type=at_least_one, default=16, help="tokens of an answer (16)")
    add("--max-prompt-tokens", type=at_least_one, default=256, help="where a text is cut off (256)")
    add("--timeout", type=float, default=120.0, help="seconds to wait for an answer (120)")


def _add_gguf_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("export", help="the exported checkpoint: folder or Hub id")
    add("output", type=new_folder, help="folder for the file, which is named after the export, and its Modelfile")
    add("--outtype", choices=GGUF_TYPES, default="q8_0", help="how weights are stored (q8_0)")
    add(
        "--llama-cpp", metavar="PATH",
        help="llama.cpp's sources, for their converter (default: those in llama-cpp-python's, fetched from PyPI once)",
    )  # fmt: skip
    add(
        "--pre-tokenizer", metavar="NAME | MODEL",
        help="how text is cut, where llama.cpp does not know the tokenizer: its own name for it, such as qwen2, or the "
        "model whose tokenizer this one was grown from",
    )  # fmt: skip
    add("--metadata", metavar="FILE", help="JSON that overrides what the card says of the model, for the converter")
    _add_comparison(parser, "how far log-probabilities may be off (default: as far as such rounding may take them)")
    add("--no-check", action="store_true", help="write the file without comparing it in llama.cpp (extra `gguf`)")
    add("--overwrite", action="store_true", help="replace a file of that name")


COMMANDS = (
    Command(
        "serve",
        "an OpenAI-compatible server of an adapter or export, with `language` in each request",
        _add_serve_arguments,
        "serve:serve",
        _read_serve_arguments,
    ),
    Command(
        "verify-served",
        "whether a running server, or a GGUF file, answers as the export does in transformers",
        _add_verify_arguments,
        "served:verify_served",
    ),
    Command(
        "gguf",
        "an export as a GGUF file, compared in llama.cpp, with a Modelfile for Ollama",
        _add_gguf_arguments,
        "served:gguf",
    ),
)
