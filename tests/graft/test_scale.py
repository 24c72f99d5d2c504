"""How much of a delta each tensor gets."""

import pytest

from peft_moe_delta.errors import GraftError
from peft_moe_delta.graft.scale import Scale


def test_a_number_is_for_every_tensor():
    assert Scale().of("model.norm.weight") == 1.0
    assert Scale(0.5).of("model.norm.weight") == 0.5
    assert Scale(0.5) == Scale(0.5) != Scale(1.0)


def test_the_first_pattern_found_counts_and_the_rest_is_whole():
    scale = Scale({r"layers\.(0|1)\.": 0.0, "self_attn": 0.5, "layers": 2})
    assert scale.of("model.layers.1.self_attn.q_proj.weight") == 0.0
    assert scale.of("model.layers.11.self_attn.q_proj.weight") == 0.5
    assert scale.of("model.layers.11.mlp.up_proj.weight") == 2
    assert scale.of("model.norm.weight") == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, {"mlp": float("-inf")}, {"mlp": "half"}])
def test_scales_are_finite_numbers(value):
    with pytest.raises(GraftError, match="scale must be a finite number.*got"):
        Scale(value)


@pytest.mark.parametrize("pattern", ["*.mlp", "(", 3])
def test_patterns_are_regular_expressions(pattern):
    with pytest.raises(GraftError, match="is no regular expression.*searched for in tensor names"):
        Scale({pattern: 1.0})
