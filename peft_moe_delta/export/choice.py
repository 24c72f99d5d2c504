"""Which form holds a model exactly, and why the others do not.

In: `UpcycledWeights`, whose tensors are asked for names, shapes and dtype only. Out: a `Fit` for every form, the best
one first, and the layout that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import GraftError
from .flex_olmo import FlexOlmoLayout
from .granite_moe import GemmaGraniteMoeLayout, GraniteMoeLayout, Qwen2GraniteMoeLayout
from .layout import Layout, MoeLayout, ReplicatedLayout
from .mixtral import MixtralLayout, Phi3MixtralLayout
from .qwen_moe import Qwen2MoeLayout, Qwen3MoeLayout
from .remote_code import RemoteCodeLayout
from .weights import UpcycledWeights

MOE_LAYOUTS: tuple[MoeLayout, ...] = (
    MixtralLayout(),
    Phi3MixtralLayout(),
    Qwen2MoeLayout(),
    Qwen3MoeLayout(),
    FlexOlmoLayout(),
    GraniteMoeLayout(),
    Qwen2GraniteMoeLayout(),
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
    if weights.config.get_text_config() is not weights.config:
        raise GraftError(f"{kind!r} is a multimodal model, which no stand-alone form holds with experts. {_KEEP}.")
    if not weights.moe_layers:
        return [Fit(kind, Layout())]
    layouts = [layout for layout in MOE_LAYOUTS if kind in layout.dense_types]
    routed = tuple(_beyond_stock(weights))
    found = [Fit(layout.name, layout, (*routed, *layout.misfits(weights))) for layout in layouts]
    if weights.dense_layers:
        replicated = weights.with_dense_layers_replicated()
        found += [
            Fit(
                f"{layout.name} with replicated dense layers ({weights.replicated_bytes:,} bytes more)",
                ReplicatedLayout(layout),
                (*routed, *layout.misfits(replicated)),
            )
            for layout in layouts
            if not layout.keeps_dense_layers
        ]
    return found


def _beyond_stock(weights: UpcycledWeights) -> Iterator[str]:
    """What no stock mixture has."""
    if weights.languages is not None:
        yield "it has no input for a token's language"
    if weights.classifiers:
        yield f"its routers have no gate before them (routing 'classifier', in the layers {list(weights.classifiers)})"
    if weights.attention is not None:
        yield f"it has no attention experts (attention_experts={weights.attention.kind!r})"
    if not weights.renormalise:
        yield "it renormalises the weights of a token's experts, and norm_topk_prob=False does not"


def every_fit(weights: UpcycledWeights) -> list[Fit]:
    """Every form of the whole model: the family's own stock forms, the other families', remote code."""
    own = stock_fits(weights)
    if not weights.moe_layers:
        return own
    held: dict[str, list[str]] = {}
    for layout in MOE_LAYOUTS:
        held.setdefault(layout.name, []).extend(layout.dense_types)
    kind = weights.config.model_type
    dense = Fit(f"dense {kind}", Layout(), (f"the layers {list(weights.moe_layers)} have more than one expert",))
    others = [
        Fit(layout.name, layout, (f"it holds mixtures of {', '.join(held[layout.name])} models",))
        for layout in {layout.name: layout for layout in MOE_LAYOUTS}.values()
        if kind not in held[layout.name]
    ]
    return [dense, *own, *others, Fit(f"{RemoteCodeLayout.name} (trust_remote_code=True)", RemoteCodeLayout())]


def choose(weights: UpcycledWeights, *, replicate_dense_layers: bool = False, remote_code: bool = False) -> Fit:
    """The first form that holds the weights exactly: the dense model if no layer has more than one expert.

    Args:
        weights: what is exported.
        replicate_dense_layers: allow copies of a layer's one expert where no architecture keeps the layer dense.
        remote_code: allow a modelling file of its own where no stock architecture is exact.

    Raises:
        GraftError: none does. The message gives each candidate's reasons and what to do instead.
    """
    found = [
        fit for fit in stock_fits(weights) if replicate_dense_layers or not isinstance(fit.layout, ReplicatedLayout)
    ]
    for fit in found:
        if not fit.misfits:
            return fit
    if remote_code:
        return Fit(RemoteCodeLayout.name, RemoteCodeLayout())
    raise GraftError(
        f"{_why_not(weights, found)} Pass remote_code=True (from file to file: "
        f'target="remote_code") for a model with its own small modelling file. {_KEEP}.'
    )


def choose_layout(
    weights: UpcycledWeights, *, replicate_dense_layers: bool = False, remote_code: bool = False
) -> Layout:
    """The layout of `choose`."""
    return choose(weights, replicate_dense_layers=replicate_dense_layers, remote_code=remote_code).layout


def explain_choice(weights: UpcycledWeights, chosen: Fit) -> str:
    """The choice in one line."""
    if isinstance(chosen.layout, RemoteCodeLayout):
        rejected = [fit for fit in stock_fits(weights) if fit.misfits]
        return f"{chosen.target}, as it holds every plan. {_why_not(weights, rejected)}"
    return f"{chosen.target}, which holds this {weights.config.model_type!r} model exactly."


def _why_not(weights: UpcycledWeights, found: list[Fit]) -> str:
    kind = weights.config.model_type
    if found:
        return f"No stock architecture can hold this {kind!r} model exactly. {'. '.join(map(str, found))}."
    known = sorted({dense for layout in MOE_LAYOUTS for dense in layout.dense_types})
    return (
        f"No stock MoE architecture is known to hold a {kind!r} model exactly; known are those for {', '.join(known)}."
    )
