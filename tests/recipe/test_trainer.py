"""A recipe's `trainer` sections reach the Trainer; what that does not know, or is said elsewhere, is refused."""

import dataclasses

import pytest
from transformers import TrainingArguments

from peft_moe_delta.errors import RecipeError
from peft_moe_delta.recipe.fields import Training
from peft_moe_delta.recipe.trainer import check_trainer, training_arguments

NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in NAMES)


def fields(**trainer):
    return Training(steps=20, batch_size=4, learning_rate=1e-3, trainer=trainer)


def test_a_recipe_says_little_and_adds_what_it_likes(tmp_path):
    usual = training_arguments(fields(), tmp_path, precision="fp32", seed=3)
    assert (usual.max_steps, usual.per_device_train_batch_size, usual.seed, usual.warmup_steps) == (20, 4, 3, 2)
    assert usual.report_to == [] and usual.lr_scheduler_type == "cosine" and not usual.bf16
    wanted = {"gradient_accumulation_steps": 8, "weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 7}
    found = training_arguments(fields(**wanted, **{CHECKPOINTING: True}), tmp_path, precision="fp32", seed=3)
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert getattr(found, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}


def test_gradients_that_add_up_need_more_text():
    assert fields().sequences == 80 and fields(gradient_accumulation_steps=8).sequences == 640


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"weight_decai": 0.1}, r"expand: trainer has 'weight_decai'.* Did you mean weight_decay\?"),
        ({"max_steps": 3}, "Set the recipe's own `steps`; remove it here"),
        ({"bf16": True}, "Set the recipe's own `precision`"),
        ({"save_strategy": "epoch"}, "A step decides that itself"),
    ],
)
def test_what_makes_no_sense_is_refused(trainer, message):
    with pytest.raises(RecipeError, match=message):
        check_trainer("expand", fields(**trainer))


def test_a_value_that_transformers_refuses_is_the_recipes_error(tmp_path):
    with pytest.raises(RecipeError, match="refused by TrainingArguments: .*sideways"):
        training_arguments(fields(lr_scheduler_type="sideways"), tmp_path, precision="fp32", seed=0)
