"""What engines add to one process and take away, worked out by hand; and what is said where nothing fits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from budget.test_measure import job
from cli.conftest import recipe_fields, write_recipe  # noqa: F401
from peft_moe_delta.budget import plan_budget
from peft_moe_delta.budget.strategies import SHARE, _advice
from peft_moe_delta.cli import main

LARGE = 10**12
RANKED = job(expert_rank=4, dtype=torch.bfloat16)


def test_copies_add_buckets_and_shards_add_what_is_whole_at_a_time():
    budget = plan_budget(RANKED, gpus=4, memory=LARGE)
    one, copies, shards = budget.strategies[:3]
    measured = budget.measured
    assert (one.engine, copies.engine, shards.engine) == ("one GPU", "DDP", "FSDP2 or ZeRO-3")
    assert (
        one.total
        == measured.total
        == (measured.base + measured.experts + measured.gradients + measured.optimizer + measured.activations)
    )
    assert copies.total == one.total + measured.gradients
    assert shards.buffers == measured.outside + 2 * measured.layer + measured.layer_gradients
    assert shards.total == pytest.approx(
        (one.total - measured.activations) / 4 + measured.activations + shards.buffers, abs=4
    )
    assert budget.tokens == 4 * 2 * 64 and budget.flops == 4 * measured.flops


def test_hours_are_work_by_speed():
    budget = plan_budget(RANKED, gpus=4, memory=LARGE)
    said = budget.hours(steps=1000, speed=budget.flops / 3.6)
    assert said.startswith("1,000 steps: 0.5 million tokens, ") and " 1.00 GPU hours at " in said


def test_four_bits_hold_the_linear_maps_of_layers_and_nothing_else():
    budget = plan_budget(RANKED, gpus=1, memory=LARGE)
    whole, packed = budget.strategies
    measured = budget.measured
    assert packed.experts == "experts of rank 4 on a 4-bit base"
    assert whole.base - packed.base == 2 * measured.linear - measured.linear * 9 // 16
    assert packed.adapter == whole.adapter


def test_where_nothing_fits_the_advice_would_help():
    # Full experts: weights and what the optimizer keeps of them, which can be spread, and little else.
    small = job(dtype=torch.bfloat16, batch_size=1, sequence_length=8)
    roomy = plan_budget(small, gpus=4, memory=LARGE)
    assert roomy.advice == () and roomy.fitting == roomy.strategies
    on_four = math.ceil(roomy.strategies[2].total / SHARE)
    tight = plan_budget(small, gpus=2, memory=on_four)
    assert not any(strategy.fits(on_four) for strategy in tight.strategies[:3])
    assert "--checkpointing" in tight.advice[0] and "has room for it on 4 GPUs" in tight.advice[1]
    fewer, copies = _advice(replace(small, checkpointing=True, autocast=True), roomy.measured, 1000)
    assert "a pass of 1 x 4 tokens has " in fewer and "kB of activations" in fewer and "--expert-dtype base" in copies


def test_the_command_prints_a_plan(write_recipe, recipe_fields, capsys):  # noqa: F811
    recipe = write_recipe(recipe_fields)
    main(["plan", recipe, "--gpus", "2", "--memory", "80GB", "--base-dtype", "bfloat16", "--tflops", "400"])
    said = capsys.readouterr().out
    assert "| experts of rank 16, FSDP2 or ZeRO-3 |" in said and "What fits: one GPU; DDP; " in said
    assert " GPU hours at 400 TFLOP a second." in said
    with pytest.raises(SystemExit):
        main(["plan", recipe, "--memory", "much"])
    assert "such as 80GB, got 'much'" in capsys.readouterr().err
