"""The graft of one tensor: copies are verbatim, sums are rounded once, what cannot be exact is refused."""

import pytest
import torch

from peft_moe_delta.errors import GraftError
from peft_moe_delta.graft import arithmetic
from peft_moe_delta.graft.arithmetic import graft_tensor
from peft_moe_delta.tensors import all_finite, low_rank_weight

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    return tensor.view(BITS[tensor.dtype])


def any_finite(dtype, seed, count=20_000):
    """Finite numbers of uniformly random bit patterns: every exponent, subnormals, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(BITS[dtype])
    patterns = torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=BITS[dtype]).view(dtype)
    patterns[: count // 100] = torch.tensor([0.0, -0.0], dtype=dtype).repeat(count // 200)
    return patterns[patterns.isfinite()][: count // 2]


def trained(dtype=torch.float32, seed=0, shape=(16, 24)):
    """A base weight, its post-trained and its expert form, as close to it as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    post, expert = (base + 0.02 * torch.randn(shape, generator=generator) for _ in range(2))
    return base.to(dtype), post.to(dtype), expert.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expert_scale", [1.0, 0.5, 0.3, 2.0])
def test_an_untrained_expert_becomes_the_post_trained_weight_bit_for_bit(dtype, expert_scale):
    base, post = any_finite(dtype, seed=1), any_finite(dtype, seed=2)
    size = min(len(base), len(post))
    base, post = base[:size], post[:size]
    grafted = graft_tensor(base, post, base.clone(), expert_scale=expert_scale)
    assert grafted.dtype == dtype
    assert torch.equal(bits(grafted), bits(post))


@pytest.mark.parametrize("expert_dtype", DTYPES)
def test_an_untrained_expert_kept_in_another_dtype_is_exact_too(expert_dtype):
    base, post = any_finite(torch.bfloat16, seed=3)[:4000].clamp(-1e4, 1e4), any_finite(torch.bfloat16, seed=4)[:4000]
    expert = base.to(expert_dtype)
    base = expert.to(torch.bfloat16)  # fp16 cannot hold every bf16 number: start from those it can
    expert = base.to(expert_dtype)
    same = expert.double() == base.double()
    assert torch.equal(bits(graft_tensor(base, post, expert))[same], bits(post)[same])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_the_expert_left_alone_is_grafted_like_the_dense_one(dtype):
    base, post, expert = trained(dtype)
    expert[::2] = base[::2]
    for scale in (1.0, 0.7, 0.0, -1.0):
        dense, grafted = graft_tensor(base, post, scale=scale), graft_tensor(base, post, expert, scale=scale)
        assert torch.equal(grafted[::2], dense[::2])
        assert not torch.equal(grafted[1::2], dense[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_verbatim(dtype):
    base, post, expert = (any_finite(dtype, seed)[:4000] for seed in (5, 6, 7))
    assert torch.equal(bits(graft_tensor(base, post)), bits(post))
    assert torch.equal(bits(graft_tensor(base, post, expert, expert_scale=0)), bits(post))
    assert torch.equal(bits(graft_tensor(base, post, expert, scale=0)), bits(expert))
    assert torch.equal(bits(graft_tensor(base, post, scale=0)), bits(base))


def test_hand_worked_values():
    base, post, expert = (torch.tensor([value]) for value in (2.0, 3.0, 6.0))
    assert graft_tensor(base, post, expert).item() == 7.0  # 2 + 4 + 1
    assert graft_tensor(base, post, expert, scale=0.5).item() == 6.5  # 2 + 4 + 0.5
    assert graft_tensor(base, post, expert, expert_scale=0.25).item() == 4.0  # 2 + 1 + 1
    assert graft_tensor(base, post, expert, scale=2.0, expert_scale=-1.0).item() == 0.0  # 2 - 4 + 2
    assert graft_tensor(base, post, scale=3.0).item() == 5.0


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sums_are_rounded_once(dtype):
    base, post, expert = trained(dtype)
    exact = expert.double() + 0.3 * (post.double() - base.double())
    assert torch.equal(graft_tensor(base, post, expert, scale=0.3), exact.to(dtype))
    naive = expert + 0.3 * (post - base)
    assert not torch.equal(naive, exact.to(dtype)), "the control: summing in the weights' own dtype is not exact"


def test_result_dtype_is_the_post_trained_one_or_the_one_asked_for():
    base, post, expert = trained(torch.bfloat16)
    assert graft_tensor(base, post, expert.float()).dtype == torch.bfloat16
    wide = graft_tensor(base, post, expert.float(), dtype=torch.float32)
    assert torch.equal(wide, (expert.double() + post.double() - base.double()).float())
    assert graft_tensor(base, post, dtype=torch.float32).dtype == torch.float32


def test_parameters_give_plain_tensors():
    base, post, expert = (torch.nn.Parameter(tensor) for tensor in trained())
    for grafted in (graft_tensor(base, post), graft_tensor(base, post, expert), graft_tensor(base, post, scale=0.0)):
        assert not grafted.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"post_trained": torch.zeros(3, 2)}, r"q_proj.*shapes differ.*base \(2, 2\), post-trained \(3, 2\)"),
        ({"expert": torch.zeros(3)}, r"q_proj.*expert \(3,\)"),
        ({"expert": torch.zeros(2, 2, dtype=torch.int8)}, r"q_proj.*int8"),
        ({"scale": float("nan")}, r"finite numbers, got \(nan, 1.0\)"),
        ({"post_trained": torch.full((2, 2), float("inf"))}, r"q_proj gives 4 values.*post-trained weight already"),
        ({"post_trained": torch.full((2, 2), 6e4), "dtype": torch.float16}, r"it overflows"),
    ],
)
def test_refusals_name_the_tensor_and_the_reason(change, message):
    given = {"base": torch.zeros(2, 2), "post_trained": torch.zeros(2, 2), "expert": torch.full((2, 2), 1e4)}
    with pytest.raises(GraftError, match=message):
        graft_tensor(**{**given, **change}, name="q_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_value_anywhere_is_found(dtype, bad):
    generator = torch.Generator().manual_seed(0)
    for place in (*range(70), 999):
        tensor = torch.randn(1000, generator=generator).to(dtype)
        assert all_finite(tensor)
        tensor[place] = bad
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_weight_by_hand_in_blocks_and_rounded_once(monkeypatch, transposed):
    monkeypatch.setattr(arithmetic, "BLOCK", 10)
    generator = torch.Generator().manual_seed(0)
    base, A, B = (torch.randn(shape, generator=generator) for shape in ((5, 7), (2, 7), (5, 2)))
    base = base.bfloat16()
    expected = (base.double() + B.double() @ A.double()).bfloat16()
    found = low_rank_weight(base.T if transposed else base, A, B, transposed=transposed)
    assert torch.equal(found.T if transposed else found, expected)
