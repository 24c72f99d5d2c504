"""`verify-served` and `gguf`, carried out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ...checkpoint import resolve
from ...errors import CheckpointError
from ...files import whole_file, write_text
from ...kinds import size_text
from ...served.client import Server
from ...served.compare import Comparison, compare
from ...served.convert import check_known, convert
from ...served.gguf import serving
from ...served.modelfile import modelfile
from ...served.prompts import Prompt, prompts_of
from ...served.record import Verified, record
from ...served.reference import Reference
from ...served.rounding import tolerance_for
from ..failure import CheckFailed
from ..options import pairs_of


def verify_served(arguments: Namespace) -> str:
    prompts = prompts_of(pairs_of("--text", arguments.text))
    kept = _export_folder(arguments.export) if arguments.record else None
    reference = Reference(
        arguments.export,
        language=arguments.language,
        tolerance=arguments.tolerance,
        trust_remote_code=arguments.trust_remote_code,
    )
    with _server(arguments) as (server, version):
        comparison = _compared(arguments, reference, server, version, prompts, arguments.url or arguments.gguf)
        engine = server.engine()
    if arguments.json is not None:
        write_text(arguments.json, comparison.json())
    if not comparison.agrees:
        raise CheckFailed(comparison.table())
    if kept is None:
        return comparison.table()
    form = "the export" if arguments.gguf is None else Path(arguments.gguf).name
    return f"{comparison.table()}\nrecorded in {record(kept, Verified.of(comparison, engine, form))}"


def gguf(arguments: Namespace) -> str:
    prompts = prompts_of(pairs_of("--text", arguments.text))
    folder, output = resolve(arguments.export), Path(arguments.output)
    name = _name(arguments.export)
    file = output / f"{name}-{arguments.outtype}.gguf"
    if file.exists() and not arguments.overwrite:
        raise CheckpointError(f"{file} is already there. Take another folder, or --overwrite it.")
    check_known(folder)
    with whole_file(file) as partial_file:
        convert(
            folder,
            partial_file.absolute(),
            outtype=arguments.outtype,
            name=name,
            source=arguments.llama_cpp,
            pre_tokenizer=arguments.pre_tokenizer,
            metadata=arguments.metadata,
        )
        said = "not checked: see `verify-served --gguf`"
        if not arguments.no_check:
            said = _checked_gguf(arguments, folder, prompts, partial_file, file)
    write_text(output / "Modelfile", modelfile(file.name, folder))
    made, stored = (
        size_text(sum(path.stat().st_size for path in paths)) for paths in ([file], folder.glob("*.safetensors"))
    )
    return f"{said}\n{file}: {made}, where the export has {stored}\nfor Ollama: {output / 'Modelfile'}"


def _checked_gguf(arguments: Namespace, folder: Path, prompts: Sequence[Prompt], made: Path, file: Path) -> str:
    """Compare a file in llama.cpp with the export, and record that they agree beside the export.

    Args:
        made: where the file is.
        file: what it will be called.
    """
    tolerance = arguments.tolerance
    if tolerance is None:
        judge = Reference(str(folder))
        ids = [judge.ids_of(prompt.text)[: arguments.max_prompt_tokens] for prompt in prompts]
        tolerance = tolerance_for(judge, ids, arguments.outtype)
        del judge  # its weights are rounded
    reference = Reference(str(folder), tolerance=tolerance)
    with serving(made, _context(arguments)) as (url, version):
        server = Server(url, timeout=arguments.timeout)
        comparison = _compared(arguments, reference, server, version, prompts, file.name)
        engine = server.engine()
    if not comparison.agrees:
        raise CheckFailed(f"{comparison.table()}\nNo file was written. {_what_now(arguments.outtype)}")
    if Path(arguments.export).is_dir():
        record(folder, Verified.of(comparison, engine, file.name))
    return comparison.table()


def _what_now(outtype: str) -> str:
    if outtype == "f32":
        return "llama.cpp does not run this model as transformers does; `peft-moe-delta explain` says what fits."
    return (
        "Try --outtype f32: where that agrees, it is the rounding, which may choose other experts where two are close. "
        "A larger --tolerance accepts it."
    )


def _compared(
    arguments: Namespace, reference: Reference, server: Server, version: str | None, prompts: Sequence[Prompt],
    called: str,
) -> Comparison:  # fmt: skip
    found = compare(
        reference,
        server,
        prompts,
        max_tokens=arguments.max_tokens,
        max_prompt_tokens=arguments.max_prompt_tokens,
        progress=partial(tqdm, desc="languages", leave=False),
    )
    return Comparison(arguments.export, called, version, reference.tolerance, arguments.max_tokens, tuple(found))


@contextmanager
def _server(arguments: Namespace) -> Iterator[tuple[Server, str | None]]:
    """Who is asked, and its version."""
    if arguments.gguf is None:
        server = Server(arguments.url, arguments.model, language=arguments.language, timeout=arguments.timeout)
        yield server, server.version()
        return
    with serving(arguments.gguf, _context(arguments)) as (url, version):
        yield Server(url, arguments.model, timeout=arguments.timeout), version


def _context(arguments: Namespace) -> int:
    """Tokens that a server has to have place for: conversations are given whole."""
    return int(2 * arguments.max_prompt_tokens + arguments.max_tokens)


def _name(export: str) -> str:
    """What an export is called: its folder's name, or the second half of its Hub id."""
    return (Path(export).absolute() if Path(export).is_dir() else Path(export)).name


def _export_folder(export: str) -> Path:
    """Where to record; found out before the work.

    Raises:
        CheckpointError: the export is on the Hub, where nothing can be written.
    """
    if not Path(export).is_dir():
        raise CheckpointError(
            f"--record writes beside the export, and {export!r} is no folder here. Download it first."
        )
    return Path(export)
