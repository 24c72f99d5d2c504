"""An optimizer that was made for other parameters than those that train now.

In: the models whose stage, adapter or groups were switched. Out: an error at the next step of an optimizer that stepped
before the switch and has not what trains since, such as that of a `Trainer` whose `train()` is called again after
`start_review()`: it would step what is frozen, leave the rest as it is, and say nothing.

torch's own hook for optimizer steps is the one place that sees both sides. It costs a dictionary lookup a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..errors import PeftMoeDeltaError


@dataclass
class _Switches:
    """What the hook knows of a model.

    Attributes:
        trains: names of the parameters that train.
        late: those that train only since the last switch.
        last: the number of that switch, counted over all models.
    """

    trains: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    last: int = 0


_models: WeakKeyDictionary[nn.Module, _Switches] = WeakKeyDictionary()
_optimizers: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
"""Optimizer -> how many switches there had been at its first step."""
_hook: list[Any] = []


def note_what_trains(model: nn.Module) -> None:
    """Remember what trains now; called wherever that may have changed."""
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    known = _models.get(model)
    if known is None:
        _models[model] = _Switches(trains)
    elif trains != known.trains:
        _models[model] = _Switches(trains, trains - known.trains, _count() + 1)
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_check))


def _count() -> int:
    return max((switches.last for switches in _models.values()), default=0)


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    began = _optimizers.setdefault(optimizer, _count())
    for model, switches in _models.items():
        if switches.last <= began:
            continue
        parameters = dict(model.named_parameters())
        if _held(optimizer).isdisjoint(map(id, parameters.values())):
            continue  # another model's
        held = set().union(*map(_held, _optimizers))
        lacking = [n for n in sorted(switches.late) if n in parameters and parameters[n].grad is not None]
        lacking = [name for name in lacking if id(parameters[name]) not in held]
        if lacking:
            raise PeftMoeDeltaError(
                f"This optimizer was made before the stage, the adapter or its groups were switched. {len(lacking)} of "
                f"the tensors that train since, such as {lacking[0]}, are in no optimizer and would stay as they are. "
                "Make a new optimizer after the switch; with transformers, a new Trainer."
            )


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
