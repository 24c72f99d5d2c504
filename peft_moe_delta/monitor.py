"""Training that goes bad says so: it stops before non-finite numbers reach the weights, and what is left is doubted.

In: what Trainer tells a callback. Out: warnings, and reasons to doubt the adapter in its config (`doubts`), from where
they come into its folder, the report of a graft, and the model card.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .errors import DataError
from .matrices import squared_norm
from .tuner import MoeDeltaConfig, MoeDeltaLayer
from .tuner.experts import LowRankLinear

FAR = 1.0
"""From here on an expert's own change, as a share of the MLP's norm, is doubted: two unrelated models of equal norm are
at sqrt(2), so such an expert has little to do with the MLP that it began as, and a delta of that one means nothing."""

PARAMETERS_PER_TOKEN = 1000
"""A group whose experts have more parameters to every token of its text is doubted. MoE-LPR trains about one to one,
the demo, which still gains, 200 to one."""


class TrainingMonitor(TrainerCallback, ExportableState):
    """Stops a training that diverges, and warns of what makes an adapter doubtful.

    - A gradient that is not finite never reaches the weights: the step is left out, and training stops with the last
      good state in the model (and in a checkpoint, unless `save_strategy="no"`). One wait for the device a step, where
      Trainer waits for the loss anyway, and one pass over the gradients. With fp16's loss scaling, which leaves such
      steps out itself and goes on, this is left to it.
    - At every log and at the end: an expert that has moved away from its MLP by more than the MLP's own norm.
    - At the end: a group that has seen very little text for its experts' size.

    A checkpoint keeps the doubts, and how much text was seen. Of several processes it keeps no amounts, and where such
    a training is resumed, nothing is said of them.

    Raises:
        DataError: a streamed data set on several processes whose batches one process cuts up for the others: rows get
            lost, or do not fit together.
    """

    def __init__(self) -> None:
        self._counts_all, self._model = True, nn.Module()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        config, layers = active_config(self._model), _layers(self._model)
        counted = (layers[0].context.tokens or {}) if layers else {}
        tokens = [[list(groups), seen.tolist()] for groups, seen in counted.items()]
        return {"args": {}, "attributes": {"doubts": config.record.doubts if config else [], "tokens": tokens}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 and isinstance(kwargs.get("train_dataloader"), DataLoaderDispatcher):
            raise DataError(
                "With a streamed data set accelerate makes batches on one process and cuts them up for the others: "
                "packed rows vanish, and padded ones differ in length. Let every process make its own: "
                'TrainingArguments(accelerator_config={"dispatch_batches": False}).'
            )
        self._model, saved = kwargs["model"], resumed_state(self, state)
        self._counts_all = state.global_step == 0 or ("tokens" in saved and args.world_size == 1)
        for layer in _layers(self._model):
            layer.context.tokens = {tuple(groups): torch.tensor(seen) for groups, seen in saved.get("tokens", [])}
        if (config := active_config(self._model)) is not None and saved.get("doubts"):
            config.change(doubts=list(dict.fromkeys([*saved["doubts"], *config.record.doubts])))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        found = [] if args.fp16 else not_finite({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if not found:
            return
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer leaves out what has none
        control.should_training_stop = True
        control.should_save = control.should_save or args.save_strategy != "no"
        doubt(
            active_config(model),
            f"training stopped at step {state.global_step + 1} of {state.max_steps}, where the gradient of {found[0]} "
            f"(and {len(found) - 1} more) was not finite. The weights are those after step {state.global_step}. Lower "
            "the learning rate, or look at the text of that step",
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log:
            _doubt_distance(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _doubt_distance(kwargs["model"])
        if self._counts_all:
            _doubt_amount(kwargs["model"], args.world_size)


def resumed_state(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """What the checkpoint that a training goes on from knows of a callback; nothing in one that begins.

    Trainer restores callbacks only where `restore_callback_states_from_checkpoint` says so, and in another order.
    """
    states: Any = state.stateful_callbacks  # by name, once there is a training
    known = states.setdefault(type(callback).__name__, callback.state())  # a checkpoint may be older than the callback
    if not state.global_step or not isinstance(known, dict):
        return {}
    saved: dict[str, Any] = known["attributes"]
    return saved


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not finite; one wait for the device where all are."""
    if not tensors:
        return []
    total: Any = torch.nn.utils.get_total_norm([t.detach() for t in tensors.values()])
    if bool((total.full_tensor() if hasattr(total, "full_tensor") else total).isfinite()):
        return []
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())] or [max(tensors)]


@torch.no_grad()
def _doubt_distance(model: nn.Module) -> None:
    """Doubt the experts that are far from their MLP."""
    for name, module in model.named_modules():
        if not isinstance(module, MoeDeltaLayer) or (adapter := module.in_force) is None:
            continue
        for number, expert in enumerate(module.experts(adapter)[1:], start=1):
            trained = [p for p in expert.parameters() if p.requires_grad]
            if not trained or any(hasattr(p, "full_tensor") or not p.numel() for p in trained):
                continue  # nothing new, or only a shard of it
            change, base = (torch.stack(part).sum() for part in zip(*_squares(expert, module.base_layer), strict=True))
            if not change <= FAR**2 * base:  # NaN, too
                share = float((change / base) ** 0.5)
                doubt(
                    active_config(model),
                    "the experts' training has diverged: one has moved by more than the norm of the weights that it "
                    "began as. Lower the learning rate",
                    f"expert {number} of {name}, by {share:.0%}",
                )
                return


def _squares(expert: nn.Module, base: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """`||E - W_0||^2` and `||W_0||^2` of each of an expert's tensors."""
    for name, module in expert.named_modules():
        if isinstance(module, LowRankLinear):
            # ||B A||^2 = tr(B^T B A A^T), without forming the product
            yield ((module.B.T @ module.B) * (module.A @ module.A.T)).sum(), squared_norm(module.frozen)
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            if parameter.requires_grad:
                before = base.get_parameter(key)
                yield (parameter.float() - before.float()).square().sum(), before.float().square().sum()


def _doubt_amount(model: nn.Module, processes: int) -> None:
    """Doubt the groups whose experts had little to learn from."""
    layers = _layers(model)
    if not layers or (adapter := layers[0].in_force) is None:
        return
    groups = layers[0].settings[adapter].tables.languages.groups
    if (seen := (layers[0].context.tokens or {}).get(groups)) is None:
        return
    parameters = [0] * len(groups)
    for layer in layers:
        for expert, group in zip(layer.experts(adapter), layer.settings[adapter].tables.owners, strict=True):
            parameters[group] += sum(p.numel() for p in expert.parameters() if p.requires_grad)
    for index, size in enumerate(parameters):
        tokens = processes * int(seen[index])
        if tokens and size > PARAMETERS_PER_TOKEN * tokens:  # who saw none has learnt nothing wrong, or does elsewhere
            doubt(
                active_config(model),
                f"the experts of {groups[index]!r} have {size:,} parameters and saw {tokens:,} tokens, fewer than one "
                f"for {PARAMETERS_PER_TOKEN:,} of them. Bring more text, or use low-rank experts (expert_rank)",
            )


def active_config(model: nn.Module) -> MoeDeltaConfig | None:
    """The configuration of a model's adapter in force, if it is one of ours."""
    configs = getattr(model, "peft_config", {})
    active: Any = model.active_adapters if configs else ()
    config = next((configs.get(name) for name in (active() if callable(active) else active)), None)
    return config if isinstance(config, MoeDeltaConfig) else None


def doubt(config: MoeDeltaConfig | None, reason: str, example: str | None = None) -> None:
    """Warn of a reason to doubt what is trained, once, and keep it with the adapter, if there is one."""
    if config is not None:
        if reason in config.record.doubts:
            return
        config.change(doubts=[*config.record.doubts, reason])
    warnings.warn(f"This training is doubtful: {reason}{f' ({example})' if example else ''}.", stacklevel=2)


def _layers(model: nn.Module) -> list[MoeDeltaLayer]:
    return [module for module in model.modules() if isinstance(module, MoeDeltaLayer)]
