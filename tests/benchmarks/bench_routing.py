"""What routing costs beside the experts themselves: CPU time of a pass's bookkeeping, operations by number of groups.

A Llama of 32 tiny layers, so that hardly anything but bookkeeping is left. First 18 groups and 129 languages, under
each routing: CPU time in which the layers find out which experts their tokens may use, and of a whole evaluation pass
beyond the dense model's. Then the ATen operations of one layer in a training pass on a batch of two languages, at 2, 16
and 128 groups.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from measure import print_table, take_turns, verdict
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.tuner import MoeDeltaLayer
from peft_moe_delta.tuner.context import ForwardContext
from peft_moe_delta.tuner.passes import ForwardState

LAYERS, GROUPS, LANGUAGES = 32, 18, 129
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip
ROUNDS = 30
MOST_MILLISECONDS, MOST_OPERATIONS = 5.0, 1.2
TOKENS = torch.arange(16).view(2, 8)
IDS = torch.tensor([0, 1])


def dense(layers: int = LAYERS) -> LlamaForCausalLM:
    """A Llama of tiny layers."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()


def upcycled(model: LlamaForCausalLM, groups: int, languages: int, **options: Any) -> PeftModel:
    """An adapter with one expert for every group but the original one, languages dealt out in turn."""
    names = ["original", *(f"group {i}" for i in range(1, groups))]
    table = {f"language {i}": names[i % groups] for i in range(languages)}
    return get_peft_model(model, MoeDeltaConfig(languages=table, experts=dict.fromkeys(names[1:], 1), **options)).eval()


def bookkeeping(context: ForwardContext, layers: Sequence[MoeDeltaLayer]) -> None:
    """What the layers ask before any of them computes."""
    context.current = ForwardState((2, 8), language_ids=IDS[:, None].expand(2, 8))
    x_TD = torch.empty(16, SHAPE["hidden_size"])
    for layer in layers:
        settings = layer.settings["default"]
        reach = layer._reach(context.state(16, False), "default", x_TD)
        layer._sets(reach, "default", None)
        assert settings.calls_router or reach.forced is not None
    context.current = None


@torch.no_grad()
def forward(model: Any, **arguments: Any) -> None:
    """One evaluation pass."""
    model(input_ids=TOKENS, use_cache=False, **arguments)


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(groups: int, routing: str) -> int:
    """Of one layer, in a training pass on two languages; all tokens choose alike under learned routing."""
    counts = []
    for layers in (1, 2):
        model = upcycled(dense(layers), groups, groups, routing=routing).train()
        for layer in model.base_model.layers().values():
            layer.router("default").weight.data.zero_()
        with Operations() as seen:
            model(input_ids=TOKENS, labels=TOKENS, language_ids=IDS)
        counts.append(seen.count)
    return counts[1] - counts[0]


def main() -> None:
    torch.manual_seed(0)
    base = dense()
    cases: dict[str, Callable[[], None]] = {"dense": partial(forward, base)}
    for routing in ("learned", "language"):
        model = upcycled(copy.deepcopy(base), GROUPS, LANGUAGES, routing=routing)
        context, layers = ForwardContext.of(model.get_base_model()), list(model.base_model.layers().values())
        cases[f"{routing}, bookkeeping"] = partial(bookkeeping, context, layers)
        cases[f"{routing}, a pass"] = partial(forward, model, language_ids=IDS)
    seconds = take_turns(cases, ROUNDS, warm_up=3, clock=time.process_time)
    fastest = {name: 1000 * min(each) for name, each in seconds.items()}
    print_table(
        f"CPU time of one pass, {GROUPS} groups x {LANGUAGES} languages x {LAYERS} layers, fastest of {ROUNDS}",
        ("", "ms", "ms beyond the dense model"),
        [(name, f"{ms:.2f}", f"{ms - fastest['dense']:.2f}" if "pass" in name else "") for name, ms in fastest.items()],
    )
    for routing in ("learned", "language"):
        print(verdict(f"{routing}, bookkeeping, ms", fastest[f"{routing}, bookkeeping"], MOST_MILLISECONDS))
    counts = {routing: [operations(groups, routing) for groups in (2, 16, 128)] for routing in ("learned", "language")}
    print_table(
        "ATen operations of a layer in a training pass, a batch of two languages",
        ("", "2 groups", "16", "128"),
        [(routing, *each) for routing, each in counts.items()],
    )
    for routing, (few, *more) in counts.items():
        print(verdict(f"{routing}, times those at 2 groups", max(more) / few, MOST_OPERATIONS))


if __name__ == "__main__":
    main()
