"""Choose a stock architecture and build the model.

In: `UpcycledWeights`. Out: a `Layout`, and from it a stand-alone `PreTrainedModel` that no longer needs this package.
"""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ..errors import GraftError
from .layout import Layout, MoeLayout
from .mixtral import MixtralLayout
from .qwen_moe import Qwen2MoeLayout, Qwen3MoeLayout
from .weights import UpcycledWeights

MOE_LAYOUTS: tuple[MoeLayout, ...] = (MixtralLayout(), Qwen2MoeLayout(), Qwen3MoeLayout())
"""Every stock MoE architecture, in order of preference."""

_KEEP = "Keep it as an adapter over the post-trained checkpoint with `graft`, which is exact for every plan"


def choose_layout(weights: UpcycledWeights) -> Layout:
    """The first architecture that holds the weights exactly: the dense one if no layer has more than one expert.

    Raises:
        GraftError: none does. The message gives each candidate's reasons and what to do instead.
    """
    if not weights.moe_layers:
        return Layout()
    kind = weights.config.model_type
    candidates = [layout for layout in MOE_LAYOUTS if kind in layout.dense_types]
    if not candidates:
        known = sorted({dense for layout in MOE_LAYOUTS for dense in layout.dense_types})
        raise GraftError(
            f"No stock MoE architecture is known to hold a {kind!r} model exactly; known are those for "
            f"{', '.join(known)}. {_KEEP}."
        )
    reasons = []
    for layout in candidates:
        misfits = list(layout.misfits(weights))
        if not misfits:
            return layout
        reasons.append(f"{layout.config_class.model_type}: {'; '.join(misfits)}")
    raise GraftError(f"No stock architecture can hold this {kind!r} model exactly. {'. '.join(reasons)}. {_KEEP}.")


def build_model(weights: UpcycledWeights, layout: Layout) -> PreTrainedModel:
    """The stand-alone model, in evaluation mode, in `weights.dtype`, sharing no memory with `weights`.

    Raises:
        GraftError: the architecture lacks a tensor of the layout, or wants one that the layout does not write.
    """
    config = layout.config(weights)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel
    model, loading_info = model_class.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.detach() for name, tensor in layout.tensors(weights)},
        dtype=weights.dtype,
        output_loading_info=True,
    )
    wrong = {key: sorted(map(str, names)) for key, names in loading_info.items() if names}
    if wrong:
        raise GraftError(
            f"The weights do not fill a {type(model).__name__}: {wrong}. The dense model has parts that this export "
            "does not know; please report its config."
        )
    for parameter in model.parameters():  # from_pretrained keeps the tensors it is given, here the dense model's own
        parameter.data = parameter.data.clone()
    return model
