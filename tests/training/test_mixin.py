"""`AuxiliaryLossMixin`: the routers' loss in trainers that make their loss themselves."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from builders import token_batch
from peft_moe_delta import AuxiliaryLossMixin, LanguageCollator
from training.common import (
    GradientRecorder,
    assert_equal,
    base_model,
    context_of,
    documents,
    expert_model,
    gradients,
    make_tokenizer,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:This training is doubtful:UserWarning")  # a few tokens, random experts

DATA = documents([7, 5, 3, 6], ["en", "hu", "az", "en"])
REVIEW = {"stage": "review", "language_prior_coef": 5.0}


class LanguageTrainer(AuxiliaryLossMixin, Trainer):
    """What a user writes."""


def expected_gradients(own_loss):
    """Of `own_loss(output, labels)` plus the auxiliary loss, which here is added by hand."""
    model = expert_model(**REVIEW)
    batch = LanguageCollator(make_tokenizer(), model)(DATA)
    labels = batch.pop("labels")
    with context_of(model).collect(1.0) as collected:
        output = model(**batch)
    (own_loss(output, labels) + collected[0]).backward()
    return gradients(model)


def smoothed(output, labels):
    return LabelSmoother(epsilon=0.3)(output, labels, shift_labels=True)


def squared(output, labels, num_items_in_batch=None):
    return F.one_hot(labels.clamp(min=0), output.logits.shape[-1]).sub(output.logits.softmax(-1)).square().mean()


@pytest.mark.parametrize(
    ("own_loss", "arguments"),
    [(smoothed, {"label_smoothing_factor": 0.3}), (squared, {"compute_loss_func": squared})],
    ids=["label smoothing", "compute_loss_func"],
)
def test_a_loss_of_the_trainer_s_own_gets_the_auxiliary_loss(tmp_path, own_loss, arguments):
    recorder = GradientRecorder()
    arguments |= {"trainer_class": LanguageTrainer, "callbacks": [recorder], "max_grad_norm": 0.0}
    train(expert_model(**REVIEW), DATA, tmp_path, **arguments)
    assert_equal(recorder.steps[0], expected_gradients(own_loss), 1e-5)


@pytest.mark.parametrize("arguments", [{"label_smoothing_factor": 0.3}, {"compute_loss_func": squared}])
def test_without_the_mixin_there_is_a_warning(tmp_path, arguments):
    with pytest.warns(UserWarning, match="AuxiliaryLossMixin"):
        train(expert_model(**REVIEW), DATA, tmp_path, **arguments)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_changes_nothing_where_the_model_s_own_loss_is_used(tmp_path, accumulation):
    arguments = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    found = []
    for trainer_class in (Trainer, LanguageTrainer):
        recorder = GradientRecorder()
        arguments |= {"trainer_class": trainer_class, "callbacks": [recorder], "max_grad_norm": 0.0}
        trainer = train(expert_model(**REVIEW), DATA, tmp_path, **arguments)
        found.append((recorder.steps[0], float(trainer.state.log_history[0]["loss"])))
    assert_equal(found[1][0], found[0][0], 1e-6)
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-5)


def test_evaluation_has_no_auxiliary_loss(tmp_path):
    model = expert_model(**REVIEW)
    trainer = train(model, DATA, tmp_path, trainer_class=LanguageTrainer, learning_rate=0.0)
    batch = LanguageCollator(make_tokenizer(), model)(DATA)
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert trainer.evaluate(DATA)["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_model_without_experts_trains_as_ever(tmp_path):
    tokens = token_batch(2, 5).tolist()
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": [], "use_cpu": True, "logging_steps": 1}

    logs = []
    for trainer_class in (Trainer, LanguageTrainer):
        trainer = trainer_class(base_model(), TrainingArguments(**arguments), train_dataset=data)
        trainer.train()
        logs.append(trainer.state.log_history[0]["loss"])
    assert logs[0] == logs[1]


EMPTY = [{"text": "" if i == 1 else "w5 w6", "language": "hu"} for i in range(4)]
"""An empty document is one end-of-text, which nothing predicts: a step on it has no target."""

PROMPTS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8], "language": code} for code in ("en", "hu", "az", "en")
]
NO_TARGETS = {
    "empty documents": (EMPTY, {}),
    "packed": ([{"input_ids": [5], "language": "hu"}, DATA[1], DATA[1], DATA[1]], {"packing": True, "max_length": 5}),
    "targets cut off": ([PROMPTS[1], DATA[1], DATA[1], DATA[1]], {"max_length": 3}),
    "review": ([{**PROMPTS[0], "labels": [-100] * 4}, DATA[0], DATA[1], DATA[2]], {}),
}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"trainer_class": LanguageTrainer}, {"trainer_class": LanguageTrainer, "label_smoothing_factor": 0.3}],
    ids=["Trainer", "mixin", "mixin and label smoothing"],
)
@pytest.mark.parametrize("case", NO_TARGETS)
def test_a_step_without_any_target_teaches_nothing(tmp_path, case, arguments):
    """As in plain transformers: its loss is 0 / 0, but no gradient comes of it."""
    data, collator = NO_TARGETS[case]
    recorder = GradientRecorder()
    model = expert_model(load_balancing_coef=1.0, **(REVIEW if case == "review" else {}))
    arguments = {"max_steps": 4, "per_device_train_batch_size": 1, "callbacks": [recorder], **arguments}
    train(model, data, tmp_path, collator=collator, **arguments)
    sizes = [sum(gradient.abs().sum() for gradient in step.values()) for step in recorder.steps]
    assert [size == 0 for size in sizes].count(True) == 1  # NaN is not 0 either
    assert all(size.isfinite() for size in sizes)
    assert all(p.isfinite().all() for p in model.parameters())
