"""A model goes to the Hub: everything that belongs to it in one commit, so that nobody ever loads half of it.

In: a model, or the folder that `save_pretrained` wrote. Out: the address of the commit. Weights travel as safetensors
only, with tokenizer, chat template, model card, expert plan, graft report and evaluation.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or its successor's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint import first_few, within
from ..checkpoint.paths import files_in
from ..errors import CheckpointError, HubError
from ..tuner import MoeDeltaTuner
from .card import GRAFT_FILE, PLAN_FILE, CardFacts, render_card

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PUBLISHED = (*WEIGHTS, "*.json", "*.jinja", "*.model", "vocab*", "merges.txt", "*.md", "*.html", "*.png", "LICENSE*")
"""What is taken from a folder."""

PRIVATE = (
    "step.json", "manifest.json", "training_args.*", "trainer_state.json", "optimizer.*", "scheduler.*", "scaler.*",
    "rng_state*", "checkpoint-[0-9]*", ".*",
)  # fmt: skip
"""Files and folders that stay home: records of the machine they were made on, and the state of a training."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DEFAULT_CARD = "[More Information Needed]"  # what PEFT's and transformers' own cards are full of


def push_to_hub(
    source: PreTrainedModel | PeftModel | str | Path,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
    extra_files: Mapping[str, Path | bytes] | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a model: adapter, grafted adapter, stock model, in memory or in a folder.

    A repository that is not there is made. Weights of an earlier upload that this one does not have are removed in the
    same commit. The client retries what fails for a moment; after a failure that lasts, call again: files that have
    arrived are not sent twice, and until the commit nothing of it is visible.

    Args:
        source: the model, or its folder. Pickled weights are refused.
        repo_id: `user/name`.
        tokenizer: goes along with a model in memory; a folder has its own.
        card: the model card; None for the folder's `README.md`, or a card made from what the files say.
        extra_files: name in the repository -> file or content, beside what the folder holds.
        base_model: Hub id that an adapter gives as its base, where it was trained over a local folder.
        private: whether a new repository is private; None for the account's default.
        revision: branch to commit to, made if need be; None for main.
        token: None for the one of `hf auth login` or `HF_TOKEN`.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: there are no safetensors to upload, or pickled weights, or a link out of the folder.
        HubError: the token is refused, the repository's name is impossible, or the Hub cannot be reached.
    """
    with _as_folder(source, tokenizer) as folder:
        files = {**_files(folder), **(extra_files or {})}
        if "adapter_config.json" in files:
            files["adapter_config.json"] = _with_base(_content(files["adapter_config.json"]), base_model)
        if card is not None:
            files["README.md"] = card.encode()
        elif "README.md" not in files or _DEFAULT_CARD in _content(files["README.md"]).decode():
            facts = CardFacts.of(folder, name=repo_id.rpartition("/")[2], base_model=base_model)
            files["README.md"] = render_card(facts).encode()
        return _commit(files, repo_id, private, revision, token, message)


@contextmanager
def _as_folder(
    source: PreTrainedModel | PeftModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Path]:
    """The model's folder: its own, or one for the time being with all that the model and its tokenizer know."""
    if isinstance(source, str | Path):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        tuner = source.base_model
        if isinstance(tuner, MoeDeltaTuner):
            (folder / PLAN_FILE).write_text(tuner.plan().to_json(), encoding="utf-8")
        elif (report := getattr(source, "graft_report", None)) is not None:
            (folder / GRAFT_FILE).write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
        yield folder


def _files(folder: Path) -> dict[str, Path | bytes]:
    """What of a folder is published: name in the repository -> file.

    Raises:
        CheckpointError: no folder, no safetensors in it, pickled weights, or a link that leads out of it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"No model at {folder}: there is no such folder. Pass what save_pretrained wrote.")
    names = {name: path for name, path in files_in(folder).items() if not any(map(_is_private, name.split("/")))}
    pickles = [name for name in names if _matches(name, PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights ({first_few(pickles)}), which can run code when loaded; only safetensors "
            "are published. Remove them, or save the model again."
        )
    # A link out of the folder would publish what it points at; those of a Hub cache to its own files stay.
    files: dict[str, Path | bytes] = {name: within(folder, name) for name in names if _matches(name, PUBLISHED)}
    if not any(_matches(name, WEIGHTS) for name in files):
        raise CheckpointError(f"{folder} holds no safetensors. Pass the folder that save_pretrained wrote.")
    return files


def _commit(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
    message: str | None,
) -> str:
    """One commit with the files as they are to stand in the repository, instead of what weights it held."""
    api = HfApi(token=token)
    with _explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in there if _matches(name, (*WEIGHTS, *PICKLES)) and name not in files]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, content) for name, content in files.items()),
            ],
            commit_message=message or "Upload with peft-moe-delta",
            revision=revision,
        )
    return commit.commit_url


def _with_base(config: bytes, base_model: str | None) -> bytes:
    """An adapter's config that names its base model as others can find it."""
    fields: dict[str, Any] = json.loads(config)
    named = fields.get("base_model_name_or_path") or ""
    if base_model is not None:
        fields["base_model_name_or_path"] = base_model
        return json.dumps(fields, indent=2, sort_keys=True).encode()
    if not named or Path(named).exists():
        warnings.warn(
            f"The adapter names {named!r} as its base model, which nobody else has. Pass base_model=<Hub id>, or "
            "those who load it have to find the base model themselves.",
            stacklevel=4,
        )
    return config


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """The client's errors, said so that one knows what to do."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repository name: {error} Expected user/name.") from error
    except (HTTPError, OSError, RuntimeError) as error:  # a RuntimeError is what the client makes of a failed upload
        if isinstance(error, OSError) and error.filename is not None:
            raise CheckpointError(f"Cannot read {error.filename} to upload it: {error.strerror}.") from error
        answer = next((e for e in _causes(error) if getattr(e, "response", None) is not None), None)
        if answer is not None:
            raise HubError(f"{_what_to_do(repo_id, answer)} The Hub said: {' '.join(str(answer).split())}") from error
        raise HubError(
            f"The Hub could not be reached for {repo_id}: {error}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error


def _causes(error: BaseException | None) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _what_to_do(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"The Hub refuses to let this token write to {repo_id}: it is wrong, expired, or has no write access there."
            " Log in with `hf auth login` and a token that may write, set HF_TOKEN, or choose a name of your own."
        )
    if status == 404:
        return (
            f"The Hub answers, but has no {repo_id} that this token can see, or not that address (status 404). Check "
            "the name and HF_ENDPOINT, and that the repository was not deleted meanwhile."
        )
    return (
        f"The upload to {repo_id} failed (status {status}); the repository is as it was. Try again: files that have "
        "arrived are not sent twice."
    )


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)


def _is_private(name: str) -> bool:
    return _matches(name, PRIVATE)
