"""Fields of `MoeDeltaConfig` with values of every kind, and the calls that a configuration goes through."""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

from peft import PeftConfig, get_peft_model

from builders import LANGUAGES, pico
from fuzz.runner import Case
from fuzz.values import bad_value
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.errors import PeftMoeDeltaError
from peft_moe_delta.tuner.record import RECORDED

ASKED = {f.name for f in dataclasses.fields(MoeDeltaConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
OURS = sorted({*ASKED, *RECORDED})
GOOD: dict[str, list[Any]] = {
    "languages": [LANGUAGES, {"en": "original", "hu": "new"}, {"hu": "new"}],
    "experts": [{"uralic": 2, "turkic": 1}, {"uralic": [1, 0], "turkic": 1}, {"new": 1}],
    "routing": ["learned", "language", "classifier"],
    "stage": ["expansion", "review"],
    "classifier_layers": [[0], [0, 1], [7]],
    "layers_to_transform": [[0], 1, [1, 0]],
    "target_modules": [["mlp"], ".*mlp", "all-linear", ["q_proj"]],
    "language_prior_groups": [["original"], ["uralic"]],
    "attention_experts": ["full", "shared_kv"],
}


def cases(seed: int) -> Iterator[Case]:
    """Endless configurations, each made and then used on a model."""
    random = Random(seed)
    while True:
        fields: dict[str, Any] = {"languages": dict(LANGUAGES), "experts": {"uralic": 2, "turkic": 1}}
        for name in random.sample(OURS, random.choice([1, 1, 2, 3])):
            good = GOOD.get(name, [])
            fields[name] = random.choice(good) if good and random.random() < 0.3 else bad_value(random)
        yield f"config {fields!r:.500}", partial(_used, fields)


def _used(fields: dict[str, Any]) -> None:
    config = MoeDeltaConfig(**fields)
    try:
        get_peft_model(pico(), config)
    except (ValueError, TypeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if str(error) and "peft_moe_delta" not in where and f"{os.sep}peft{os.sep}" in where:
            raise PeftMoeDeltaError(f"PEFT's own: {error}") from error  # what it says of any method's target modules
        raise
