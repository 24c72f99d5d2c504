"""Output that appears whole or not at all: single files, folders, and folders whose making can be taken up again.

In: what to write. Out: files under their final names only once they are complete and on the disk. Until then they lie
beside their place, under a hidden name, so that the last step is a rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import beside, whole_file, writing
from ..kinds import size_text
from .header import unique_json
from .manifest import file_sha256

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not told apart there
    fcntl = None  # type: ignore[assignment]


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file beside its place, then move it there: readers see the old file or the new one.

    Args:
        path: the file; its folder is made if need be.
        tensors: any dtype and device; no two may share memory.
        metadata: further strings for the header.

    Raises:
        CheckpointError: the disk is full, or the folder may not be written.
    """
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(content, partial, metadata={"format": "pt", **(metadata or {})})


@contextmanager
def whole_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `output` when the block ends without an error and vanishes otherwise.

    Raises:
        CheckpointError: before anything is written: `output` is a file, or holds files and `overwrite` is false, or
            cannot be written; later: the disk is full or fails.
    """
    output = Path(output).resolve()
    partial, replaced = beside(output), beside(output)
    with writing(output):
        _refuse_existing(output, overwrite)
        partial.mkdir(parents=True)
        try:
            yield partial
            _move(partial, output, replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class Job:
    """A folder under way, and which of its files are finished.

    Attributes:
        folder: where the files go.
        finished: name -> sha256 of the files that an earlier run, which was killed, has finished; checked.
    """

    def __init__(self, work: Path, key: str) -> None:
        self._key, self._record = key, work / "progress.json"
        self.folder = work / "folder"
        self.finished = self._taken_up()
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        for file in self.folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in self.finished:
                file.unlink()
        self._note()

    def finish(self, name: str, sha256: str) -> None:
        """Note that a file of the folder is complete; it is made to stay on the disk first."""
        sync(self.folder / name)
        self.finished[name] = sha256
        self._note()

    def _taken_up(self) -> dict[str, str]:
        """The finished files of an earlier run of the same job, as far as they still are what they were."""
        try:
            record = unique_json(self._record.read_bytes())
            files: dict[str, str] = record["files"] if record["key"] == self._key else {}
            return {name: sha256 for name, sha256 in files.items() if file_sha256(self.folder / name) == sha256}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # killed before its first note, or the note is damaged: from the beginning

    def _note(self) -> None:
        partial = self._record.with_suffix(".new")
        # Not waited for: a note that is lost with the power costs work, and one that is wrong is found by the hashes.
        partial.write_text(json.dumps({"key": self._key, "files": self.finished}), encoding="utf-8")
        os.replace(partial, self._record)


@contextmanager
def resumable_folder(output: str | Path, key: str, *, overwrite: bool = False) -> Iterator[Job]:
    """A folder to write into, which becomes `output` when the block ends without an error.

    After an error nothing is left. After a kill or Ctrl-C the finished files stay, hidden beside `output`, and the next
    run with the same `key` takes them up.

    Args:
        output: the folder to make.
        key: everything that the files depend on, as one string.
        overwrite: whether a folder with files in it may be replaced.

    Raises:
        CheckpointError: before anything is written: `output` exists, cannot be written, or another run is writing it;
            later: the disk is full or fails.
    """
    output = Path(output).expanduser().resolve()
    work = output.with_name(f".{output.name}.partial")
    with writing(output):
        _refuse_existing(output, overwrite)
        with _locked(work):
            try:
                _refuse_existing(output, overwrite)  # the run that held the lock until now may have made it
                job = Job(work, key)
                yield job
                for file in sorted(job.folder.rglob("*")):
                    if file.name not in job.finished:
                        sync(file)
                sync(job.folder)
                _move(job.folder, output, work / "replaced")
                sync(output.parent)
            except KeyboardInterrupt:
                raise
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Refuse a job that the disk cannot hold.

    Raises:
        CheckpointError: fewer than `needed` bytes are free where `folder` is or will be.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The output needs {size_text(needed)}, and the disk of {folder} has {size_text(free)} free. Make "
            "room, or choose an output folder on another disk."
        )


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold a folder, made if need be. The system ends the lock with its process, so none is ever left behind."""
    work.parent.mkdir(parents=True, exist_ok=True)
    while True:
        work.mkdir(exist_ok=True)
        if fcntl is None:
            yield
            return
        descriptor = os.open(work, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if work.exists() and os.path.samestat(os.fstat(descriptor), work.stat()):
                yield
                return
        except BlockingIOError:
            raise CheckpointError(
                f"Another run is writing this output: it holds {work}. Wait for it, or choose another output folder."
            ) from None
        finally:
            os.close(descriptor)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not overwrite):
        kind = "a file" if output.is_file() else "a folder with files in it"
        raise CheckpointError(
            f"{output} is {kind}. Choose another output folder, or pass overwrite=True to replace one."
        )


def _move(folder: Path, output: Path, replaced: Path) -> None:
    """Put a folder into its place; what was there goes, or comes back where that fails or is interrupted."""
    try:
        if output.exists():
            output.rename(replaced)
        folder.rename(output)
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
