"""`verify-served`: whether a server answers as an export does in plain transformers."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError

from .options import Command, new_file


def at_least_one(text: str) -> int:
    """A whole number from 1 on; argparse calls it."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _add_verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("export", help="the exported checkpoint, or an adapter: folder or Hub id")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--url", help="of a running OpenAI-compatible server, such as http://127.0.0.1:8000")
    asked.add_argument("--gguf", metavar="FILE", help="the export in GGUF, run in llama.cpp (extra `gguf`)")
    add = parser.add_argument
    add("--model", metavar="NAME", help="what the server calls it (default: the first that it lists)")
    add("--language", help="sent with every request, to a server that takes a `language`")
    add(
        "--text", metavar="LANGUAGE=FILE", action="append", default=[],
        help="jsonl with `text`, of which the first is asked (default: built-in sentences)",
    )  # fmt: skip
    add(
        "--tolerance", type=float,
        help="how far log-probabilities may be off (0.001; 0.1 for a 16-bit export)",
    )  # fmt: skip
    add("--max-tokens", type=at_least_one, default=16, help="tokens of an answer (16)")
    add("--max-prompt-tokens", type=at_least_one, default=256, help="where a text is cut off (256)")
    add("--timeout", type=float, default=120.0, help="seconds to wait for an answer (120)")
    add("--json", type=new_file, metavar="FILE", help="write every finding to a file")
    add("--trust-remote-code", action="store_true", help="load an export of --target remote_code")


COMMANDS = (
    Command(
        "verify-served",
        "whether a running server, or a GGUF file, answers as the export does in transformers",
        _add_verify_arguments,
        "served:verify_served",
    ),
)
