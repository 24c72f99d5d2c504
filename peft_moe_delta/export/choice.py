"""Which form holds a model exactly, and why the others do not.

In: `UpcycledWeights`, whose tensors are asked for names, shapes and dtype only. Out: a `Fit` for every form, the best
one first, and the layout that was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import GraftError
from .flex_olmo import FlexOlmoLayout
from .granite_moe import GemmaGraniteMoeLayout, GraniteMoeLayout
from .layout import Layout, MoeLayout, ReplicatedLayout
from .mixtral import MixtralLayout, Phi3MixtralLayout
from .qwen_moe import Qwen2MoeLayout, Qwen3MoeLayout
from .weights import UpcycledWeights

MOE_LAYOUTS: tuple[MoeLayout, ...] = (
    MixtralLayout(),
    Phi3MixtralLayout(),
    Qwen2MoeLayout(),
    Qwen3MoeLayout(),
    FlexOlmoLayout(),
    GraniteMoeLayout(),
    GemmaGraniteMoeLayout(),
)
"""Every stock MoE architecture for every dense family it can hold, in order of preference."""

_KEEP = "Keep it as an adapter over the post-trained checkpoint with `graft`, which is exact for every plan"


@dataclass(frozen=True)
class Fit:
    """Whether a form holds the weights exactly.

    Attributes:
        target: name of the form: a `model_type`, with what is special about it.
        layout: writes that form.
        misfits: why it does not fit; empty where it does.
    """

    target: str
    layout: Layout
    misfits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.target}: {'; '.join(self.misfits) or 'exact'}"


def stock_fits(weights: UpcycledWeights) -> list[Fit]:
    """Every stock form in order of preference: the dense model, mixtures, mixtures with replicated dense layers."""
    kind = weights.config.model_type
    if not weights.moe_layers:
        return [Fit(kind, Layout())]
    layouts = [layout for layout in MOE_LAYOUTS if kind in layout.dense_types]
    found = [Fit(layout.name, layout, tuple(layout.misfits(weights))) for layout in layouts]
    if weights.dense_layers:
        replicated = weights.with_dense_layers_replicated()
        found += [
            Fit(
                f"{layout.name} with replicated dense layers ({weights.replicated_bytes:,} bytes more)",
                ReplicatedLayout(layout),
                tuple(layout.misfits(replicated)),
            )
            for layout in layouts
            if not layout.keeps_dense_layers
        ]
    return found


def choose_layout(weights: UpcycledWeights, *, replicate_dense_layers: bool = False) -> Layout:
    """The first architecture that holds the weights exactly: the dense one if no layer has more than one expert.

    Args:
        weights: what is exported.
        replicate_dense_layers: allow copies of a layer's one expert where no architecture keeps the layer dense.

    Raises:
        GraftError: none does. The message gives each candidate's reasons and what to do instead.
    """
    found = [
        fit for fit in stock_fits(weights) if replicate_dense_layers or not isinstance(fit.layout, ReplicatedLayout)
    ]
    for fit in found:
        if not fit.misfits:
            return fit.layout
    kind = weights.config.model_type
    if not found:
        known = sorted({dense for layout in MOE_LAYOUTS for dense in layout.dense_types})
        raise GraftError(
            f"No stock MoE architecture is known to hold a {kind!r} model exactly; known are those for "
            f"{', '.join(known)}. {_KEEP}."
        )
    reasons = ". ".join(map(str, found))
    raise GraftError(f"No stock architecture can hold this {kind!r} model exactly. {reasons}. {_KEEP}.")
