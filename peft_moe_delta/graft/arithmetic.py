"""The graft of one tensor.

In: a weight of the base model, of the post-trained model and, for an expert, of the expert grown from the base weight.
Out: the grafted weight. With `W_0` base, `P` post-trained, `E` expert, `s` scale and `a` expert scale (DeltaMoE, arXiv
2605.18083; `a` is ours):

    D      = W_0 + s (P - W_0)          the dense weight after the graft; expert 0 keeps it
    result = D + a (E - W_0)            the expert adds what it learnt

which is `W_0 + a (E - W_0) + s (P - W_0)`. What is known is copied, never computed: at scale 1 `D` is `P` itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import GraftError
from ..tensors import BLOCK, all_finite, rounded


@torch.no_grad()
def graft_tensor(
    base: Tensor,
    post_trained: Tensor,
    expert: Tensor | None = None,
    *,
    scale: float = 1.0,
    expert_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    name: str = "tensor",
) -> Tensor:
    """Graft the post-training delta onto one weight.

    Three cases are copies, not sums: no expert (or `expert_scale` 0) at scale 1 is `post_trained`, at scale 0 `base`;
    scale 0 at `expert_scale` 1 is `expert`. Any other is summed in fp64 if one of the inputs is fp32 or fp64, else in
    fp32, and rounded once. An element that the expert has not changed (`E == W_0`) comes out at scale 1 as the
    post-trained one, bit for bit.

    Args:
        base: `W_0`, any shape, floating point.
        post_trained: `P`, same shape.
        expert: `E`, same shape, or None for weights that are not an expert's.
        scale: how much of the post-training delta to add.
        expert_scale: how much of the expert's own change to keep.
        dtype: of the result; `post_trained`'s by default.
        name: what errors call the tensor.

    Returns:
        The grafted weight, shape of `base`; a copy may share its input's storage.

    Raises:
        GraftError: shapes differ, an input is not floating point, a scale or the result is not finite.
    """
    if expert_scale == 0:
        expert = None
    _check(name, {"base": base, "post-trained": post_trained, "expert": expert}, (scale, expert_scale))
    dtype = dtype or post_trained.dtype
    if expert is None and scale in (0, 1):
        return rounded(post_trained if scale else base, dtype, name)
    if expert is not None and scale == 0 and expert_scale == 1:
        return rounded(expert, dtype, name)
    grafted = torch.empty(base.shape, dtype=dtype, device=post_trained.device)
    if grafted.is_meta:
        return grafted
    wide = _sum_dtype(base, post_trained, base if expert is None else expert)
    # Block by block: the wide sums stay in the processor's cache, and memory in that of the result.
    parts = [t.detach().reshape(-1).split(BLOCK) for t in (base, post_trained, base if expert is None else expert)]
    for start, end, own, block in zip(*parts, grafted.reshape(-1).split(BLOCK), strict=True):
        start, total = start.to(wide), end.to(wide)
        if scale != 1:
            total = start + scale * (total - start)
        if expert is not None:
            # Written as a subtraction because a -0.0 survives `- 0.0` but not `+ 0.0`, and untrained elements must.
            change = start - own.to(wide)
            total = total - (change if expert_scale == 1 else expert_scale * change)
        block.copy_(total)
    if not all_finite(grafted):
        inputs = {"base": base, "post-trained": post_trained, "expert": expert}
        bad = [key for key, tensor in inputs.items() if tensor is not None and not tensor.isfinite().all()]
        cause = f"The {' and '.join(bad)} weight already is not." if bad else "The inputs are finite: it overflows."
        raise GraftError(
            f"Grafting {name} gives {int((~grafted.isfinite()).sum())} values that are not finite in {dtype}. {cause} "
            "Check that checkpoint, or graft with smaller scales."
        )
    return grafted


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32 for 16-bit weights, fp64 as soon as one is wider."""
    return torch.float32 if all(tensor.element_size() < 4 for tensor in tensors) else torch.float64


def _check(name: str, tensors: dict[str, Tensor | None], scales: tuple[float, float]) -> None:
    """Refuse what the equation does not describe."""
    given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    if len({tensor.shape for tensor in given.values()}) > 1:
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in given.items())
        raise GraftError(f"Cannot graft {name}: the shapes differ ({shapes}). Use checkpoints of the same model.")
    if any(not tensor.is_floating_point() for tensor in given.values()):
        dtypes = ", ".join(f"{key} {tensor.dtype}" for key, tensor in given.items())
        raise GraftError(f"Cannot graft {name}: it needs floating-point weights, got {dtypes}. Load them unquantised.")
    if not all(map(math.isfinite, scales)):
        raise GraftError(f"Cannot graft {name}: scale and expert_scale must be finite numbers, got {scales}.")
