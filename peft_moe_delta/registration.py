"""Makes PEFT know this method. The only module that touches PEFT's registries.

`peft.register_peft_method` accepts only members of PEFT's own enum, so the three tables it fills are filled here.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .model import MoeDeltaModel
from .tuner.config import MoeDeltaConfig, MoeDeltaType


def register() -> None:
    """Enter config, tuner and parameter prefix under `"MOE_DELTA"`. Doing it twice changes nothing.

    Raises:
        RuntimeError: another class already stands under that name.
    """
    key = MoeDeltaType.MOE_DELTA
    entries: tuple[tuple[dict[Any, Any], object], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, MoeDeltaConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MoeDeltaModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, MoeDeltaModel.prefix),
    )
    for table, value in entries:
        if table.setdefault(key, value) is not value and table[key] != value:
            raise RuntimeError(
                f"PEFT already has {table[key]!r} under {key.value!r}, so {value!r} cannot be registered. "
                "Import only one package that defines this method."
            )
