"""Which form holds a model exactly, and why the others do not.

In: `UpcycledWeights`, whose tensors are asked for names, shapes and dtype only; where it matters, the architecture or
the engine that is to run them. Out: a `Fit` for every form, the best one first, and the layout that was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..engines import ARCHITECTURES, DENSE, ENGINES, REMOTE_CODE, Traits, cells_of, runs, why_not
from ..errors import GraftError
from ..files import read_text
from ..loading import load_config
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
        engines: engine -> what it does with this form, where that was asked for.
    """

    target: str
    layout: Layout
    misfits: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.target}: {'; '.join(self.misfits) or 'exact'}"


REMOTE_FIT = Fit(REMOTE_CODE, RemoteCodeLayout())


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
        return [with_engines(weights, fit) for fit in own]
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
    remote = replace(REMOTE_FIT, target=f"{REMOTE_CODE} (trust_remote_code=True)")
    return [with_engines(weights, fit) for fit in (dense, *own, *others, remote)]


def traits_of(weights: UpcycledWeights, layout: Layout) -> Traits:
    """What of an export makes engines differ."""
    config = weights.config
    width = config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return Traits(
        architecture=layout.name,
        family=config.model_type,
        dense_layers=bool(weights.dense_layers) and not layout.replicates,
        own_head_width=getattr(config, "head_dim", None) not in (None, width),
        positions=rope.get("rope_type", "default"),
        window=getattr(config, "sliding_window", None) is not None,
        biases=any(name.endswith("q_proj.bias") for name in weights.dense),
        beyond_text=weights.attention is not None or weights.languages is not None,
    )


def traits_of_export(folder: Path) -> Traits:
    """The same of a stand-alone checkpoint that lies in files, by its config.

    Raises:
        CheckpointError: there is none, or it is damaged.
        DataError: there is no config.json.
    """
    fields = json.loads(read_text(folder / CONFIG_NAME))
    if "auto_map" in fields:  # which transformers would run
        ours = fields.get("moe_delta") or {}
        beyond_text = bool(ours.get("languages")) or "attention" in (ours.get("parts") or {}).values()
        return Traits(REMOTE_CODE, "", False, False, "default", False, False, beyond_text)
    config: Any = load_config(folder)
    width = config.hidden_size // config.num_attention_heads
    return Traits(
        architecture=config.model_type if config.model_type in ARCHITECTURES else DENSE,
        family=config.model_type,
        dense_layers=bool(getattr(config, "mlp_only_layers", None)),
        own_head_width=getattr(config, "head_dim", None) not in (None, width),
        positions=(getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"),
        window=bool(getattr(config, "sliding_window", None)),  # Qwen2-MoE says 0 where there is none
        biases=bool(getattr(config, "attention_bias", False)),
        beyond_text=False,
    )


def with_engines(weights: UpcycledWeights, fit: Fit) -> Fit:
    """The fit with what each engine does with this form."""
    return replace(fit, engines=cells_of(traits_of(weights, fit.layout)))


def choose(
    weights: UpcycledWeights,
    *,
    replicate_dense_layers: bool = False,
    remote_code: bool = False,
    architecture: str | None = None,
    serve_with: str | None = None,
) -> Fit:
    """The first form that holds the weights exactly: the dense model if no layer has more than one expert.

    Args:
        weights: what is exported.
        replicate_dense_layers: allow copies of a layer's one expert where no architecture keeps the layer dense.
        remote_code: allow a modelling file of its own where no stock architecture is exact.
        architecture: only this one (`model_type`), with copies in any case where `replicate_dense_layers` asks for
            them.
        serve_with: only what this engine (one of `engines.ENGINES`) runs exactly, with copies where that is the way.

    Raises:
        GraftError: none does. The message gives each candidate's reasons and what to do instead.
    """
    copies = replicate_dense_layers or serve_with is not None
    found = [fit for fit in stock_fits(weights) if copies or not fit.layout.replicates]
    if architecture is not None:
        found = _of_architecture(found, architecture, replicate_dense_layers)
    for fit in [*found, REMOTE_FIT] if remote_code else found:
        if not fit.misfits and not _engine_misfits(weights, fit, serve_with):
            return fit
    if serve_with is not None:
        raise GraftError(_not_in_engine(weights, [*found, REMOTE_FIT], serve_with))
    raise GraftError(
        f"{_why_not(weights, found)} Pass remote_code=True (from file to file: "
        f'target="remote_code") for a model with its own small modelling file. {_KEEP}.'
    )


def choose_remote_code(weights: UpcycledWeights, *, serve_with: str | None = None) -> Fit:
    """Remote code, wherever a stock architecture would do.

    Raises:
        GraftError: the engine does not run it.
    """
    if _engine_misfits(weights, REMOTE_FIT, serve_with):
        raise GraftError(_not_in_engine(weights, [*stock_fits(weights), REMOTE_FIT], str(serve_with)))
    return REMOTE_FIT


def choose_layout(
    weights: UpcycledWeights, *, replicate_dense_layers: bool = False, remote_code: bool = False
) -> Layout:
    """The layout of `choose`."""
    return choose(weights, replicate_dense_layers=replicate_dense_layers, remote_code=remote_code).layout


def explain_choice(weights: UpcycledWeights, chosen: Fit, serve_with: str | None = None) -> str:
    """The choice in one line."""
    if isinstance(chosen.layout, RemoteCodeLayout):
        rejected = [fit for fit in stock_fits(weights) if fit.misfits]
        return f"{chosen.target}, as it holds every plan. {_why_not(weights, rejected)}"
    held = f"{chosen.target}, which holds this {weights.config.model_type!r} model exactly"
    if serve_with is None:
        return f"{held}."
    cell = cells_of(traits_of(weights, chosen.layout))[serve_with]
    return f"{held}; {serve_with} ({ENGINES[serve_with]}): {cell}."


def _of_architecture(found: list[Fit], architecture: str, replicate: bool) -> list[Fit]:
    """The forms of one architecture, those with copies first where they are asked for.

    Raises:
        GraftError: the family, or a language's share, has no such form.
    """
    names = dict.fromkeys(fit.layout.name for fit in found)
    if architecture not in names:
        raise GraftError(
            f"architecture={architecture!r} is no form of this model; expected one of: {', '.join(names) or 'none'}."
        )
    chosen = [fit for fit in found if fit.layout.name == architecture]
    return sorted(chosen, key=lambda fit: not fit.layout.replicates) if replicate else chosen


def _engine_misfits(weights: UpcycledWeights, fit: Fit, engine: str | None) -> tuple[str, ...]:
    """Why an engine does not run a form exactly; nothing where no engine is asked for."""
    if engine is None:
        return ()
    if engine not in ENGINES:
        raise GraftError(f"serve_with={engine!r} is no engine of the table; expected one of: {', '.join(ENGINES)}.")
    return tuple(why_not(traits_of(weights, fit.layout), engine))


def _not_in_engine(weights: UpcycledWeights, found: list[Fit], engine: str) -> str:
    """Why an engine runs none of the forms, and who runs those that are exact."""
    reasons = [str(replace(fit, misfits=(*fit.misfits, *_engine_misfits(weights, fit, engine)))) for fit in found]
    elsewhere = {fit.target: _who_runs(weights, fit) for fit in found if not fit.misfits}
    fitting = "; ".join(f"{target} in {', '.join(names)}" for target, names in elsewhere.items())
    return (
        f"{engine} ({ENGINES[engine]}) runs no form of this {weights.config.model_type!r} model exactly. "
        f"{'. '.join(reasons)}. What fits: {fitting}. Choose one of these engines, or check the form that you want "
        "yourself and name it with architecture=..., without serve_with."
    )


def _who_runs(weights: UpcycledWeights, fit: Fit) -> list[str]:
    return [engine for engine, cell in cells_of(traits_of(weights, fit.layout)).items() if runs(cell)]


def _why_not(weights: UpcycledWeights, found: list[Fit]) -> str:
    kind = weights.config.model_type
    if found:
        return f"No stock architecture can hold this {kind!r} model exactly. {'. '.join(map(str, found))}."
    known = sorted({dense for layout in MOE_LAYOUTS for dense in layout.dense_types})
    return (
        f"No stock MoE architecture is known to hold a {kind!r} model exactly; known are those for {', '.join(known)}."
    )
