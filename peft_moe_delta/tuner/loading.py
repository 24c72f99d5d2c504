"""An adapter's file must hold all of the adapter, whoever loads it.

In: a model with a new adapter, and the tensors that were found for it. Out: nothing, or a `CheckpointError` and the
model without that adapter: routers left at their random start and experts left as copies would answer, but wrongly.

PEFT asks the tuner before it loads. transformers (`load_adapter`, `from_pretrained` of an adapter's folder) asks
nobody: it logs what is missing, and puts new parameters in place of ours, which then train whatever the stage says. It
reads tensors through the model's `_load_pretrained_model`, so that is where `AdapterLoad` waits for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..errors import CheckpointError

_METHOD = "_load_pretrained_model"


def check_complete(model: Any, adapter_name: str, missing: Collection[str]) -> None:
    """Take an adapter off the model again, and say so, if tensors of it are missing.

    Args:
        model: a PEFT model, or transformers' with the adapter inside.
        missing: keys of the model for which the file has nothing, or nothing that fits; others' keys do not count.

    Raises:
        CheckpointError: any of the adapter's tensors is missing.
    """
    ours = re.compile(rf"(?:^|\.)(moe_delta_[^.]+|modules_to_save)\.{re.escape(adapter_name)}\.")
    lacking = sorted(key for key in missing if ours.search(key))
    if not lacking:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        model.delete_adapter(adapter_name)
    raise CheckpointError(
        f"The adapter's file lacks {len(lacking)} of its tensors, or has them in another shape, such as {lacking[0]}: "
        "those would stay at their random start. The file is incomplete; fetch or save the adapter again."
    )


def check_keys(state_dict: Mapping[str, Any], blocks: Collection[str], prefix: str) -> None:
    """Refuse another adapter's tensors, before anything is changed.

    Raises:
        CheckpointError: they are not those of experts in exactly these blocks.
    """
    found = {key.partition(f".{prefix}experts")[0] for key in state_dict if f".{prefix}experts" in key}
    found = {name.removeprefix("base_model.model.") for name in found}
    if found != set(blocks):
        raise CheckpointError(
            f"The state dict has experts in {sorted(found) or 'no module'}, its configuration in {sorted(blocks)}. "
            "Pass the configuration and the tensors of one adapter."
        )


class AdapterLoad:
    """Stands before a model's `_load_pretrained_model` for the one load that follows an injection."""

    def __init__(self, model: PreTrainedModel, adapter_name: str, inference_mode: bool) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.inference_mode = inference_mode

    @classmethod
    def expect(cls, model: PreTrainedModel, adapter_name: str, inference_mode: bool) -> None:
        """Check the next load into the model, which is going to be this adapter's."""
        if isinstance(model, PreTrainedModel):
            model.__dict__[_METHOD] = cls(model, adapter_name, inference_mode)

    @classmethod
    def forget(cls, model: Any) -> None:
        """PEFT has loaded the adapter, or the adapter is gone."""
        for module in model.modules():
            if isinstance(module.__dict__.get(_METHOD), cls):
                del module.__dict__[_METHOD]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.forget(self.model)
        loading: Any = self.model
        info, rest = loading._load_pretrained_model(*args, **kwargs)
        check_complete(self.model, self.adapter_name, {*info.missing_keys, *(key for key, *_ in info.mismatched_keys)})
        info.missing_keys.clear()  # the rest is the base's or other adapters', which transformers would report
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) and self.adapter_name in getattr(module, "settings", ()):
                module.set_adapter(module.active_adapters, inference_mode=self.inference_mode)
        return info, rest
