"""What a user's process does with the Hub. Runs in a process whose Hub is the loopback one: see `conftest.py`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from builders import logits, token_batch
from peft_moe_delta.checkpoint import resolve
from peft_moe_delta.hub import push_to_hub

TOKENS = token_batch(2, 5)


def ready() -> None:
    """Imports are done."""


def load(model: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def push(source: str, repo: str, **options: Any) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The adapter names")
        return push_to_hub(source, repo, **options)


def push_to_nobody(source: str, repo: str) -> None:
    """The Hub does not answer."""
    constants.ENDPOINT, endpoint = "http://127.0.0.1:9", constants.ENDPOINT
    try:
        push(source, repo)
    finally:
        constants.ENDPOINT = endpoint


def push_loaded(base: str, adapter: str, post_trained: str, prefix: str) -> None:
    """Adapter, grafted adapter and stock model, from memory."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load(base), adapter)
    push_to_hub(model, f"{prefix}-adapter", tokenizer=tokenizer, base_model=base)
    push_to_hub(model.graft(post_trained), f"{prefix}-grafted", tokenizer=tokenizer, base_model=post_trained)
    push_to_hub(model.merge_and_graft(post_trained), f"{prefix}-stock", tokenizer=tokenizer)


def download(repo: str, **options: Any) -> str:
    return snapshot_download(repo, **options)


def adapter_logits(base: str, adapter: str, revision: str | None = None) -> list[Any]:
    return logits(PeftModel.from_pretrained(load(base), adapter, revision=revision), TOKENS).tolist()


def graft_logits(base: str, adapter: str, post_trained: str) -> list[Any]:
    """`merge_and_graft` with everything given as in a user's first script."""
    model = PeftModel.from_pretrained(load(base), adapter)
    return logits(model.merge_and_graft(post_trained), TOKENS).tolist()


def model_logits(model: str) -> list[Any]:
    return logits(load(model), TOKENS).tolist()


def chat_template(repo: str) -> str:
    return AutoTokenizer.from_pretrained(repo).chat_template


def resolved(repo: str, revision: str | None = None) -> list[str]:
    return sorted(path.name for path in resolve(repo, revision).iterdir())


def card_metadata(repo: str) -> dict[str, Any]:
    card = ModelCard.load(repo)
    card.validate()
    return json.loads(json.dumps(card.data.to_dict()))


def push_as_transformers_does(folder: str, repo: str) -> None:
    """The method that every model has anyway."""
    load(folder).push_to_hub(repo)
