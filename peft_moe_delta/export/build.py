"""Build the model.

In: `UpcycledWeights` and the `Layout` that holds them. Out: a stand-alone `PreTrainedModel` that no longer needs this
package.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import GraftError
from .layout import Layout
from .weights import UpcycledWeights


def build_model(weights: UpcycledWeights, layout: Layout) -> PreTrainedModel:
    """The stand-alone model, in evaluation mode, in `weights.dtype` on `weights.device`, sharing no memory with them.

    Raises:
        GraftError: the architecture lacks a tensor of the layout, or wants one that the layout does not write.
    """
    config = layout.config(weights)
    model_class: Any = layout.model_class(weights)
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
    # A layout makes some tensors of its own, and the model its buffers, on the CPU.
    return model.to(weights.device)  # type: ignore[arg-type]  # `to` loses its self
