"""TRL's `SFTTrainer`: it makes its loss from log-probabilities, so the routers' loss must find its own way in."""

import pytest
import torch
from datasets import Dataset

from builders import moe_config, token_batch
from peft_moe_delta import AuxiliaryLossMixin, LanguageCollator, RoutingCallback
from training.common import GradientRecorder, assert_equal, base_model, documents, expert_model, make_tokenizer, train

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:This training is doubtful:UserWarning"),  # a few tokens, random experts
]

DOCUMENTS = documents([7, 5, 3, 6], ["en", "hu", "az", "en"])


class LanguageSFTTrainer(AuxiliaryLossMixin, trl.SFTTrainer):
    """What a user writes."""


def as_text(rows):
    return [{"text": " ".join(f"w{i}" for i in row["input_ids"]), "language": row["language"]} for row in rows]


def sft(
    model,
    folder,
    *,
    rows=DOCUMENTS,
    trainer=LanguageSFTTrainer,
    callbacks=(),
    peft_config=None,
    packing=False,
    **arguments,
):
    defaults = {"max_steps": 1, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4, "bf16": False}
    collator = LanguageCollator(
        make_tokenizer(), peft_config or model, packing=packing, max_length=16 if packing else None
    )
    run = trainer(
        model,
        trl.SFTConfig(str(folder), **{**defaults, **arguments}),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        data_collator=collator,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    run.train()
    return run


STAGES = {
    "expansion": {"load_balancing_coef": 5.0},
    "review": {"stage": "review", "language_prior_coef": 5.0},
    "review by language": {"stage": "review", "language_prior_coef": 5.0, "routing": "language"},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("changes", STAGES.values(), ids=STAGES)
def test_a_step_is_that_of_the_plain_trainer(tmp_path, changes, accumulation):
    """Loss and gradients, with coefficients that make the routers' loss dominate."""
    arguments = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    arguments |= {"max_grad_norm": 0.0, "seed": 1}
    steps, losses = [], []
    for run in (train, lambda model, data, folder, **kw: sft(model, folder, rows=data, **kw)):
        recorder = GradientRecorder()
        trainer = run(expert_model(**changes), DOCUMENTS, tmp_path, callbacks=[recorder], **arguments)
        steps.append(recorder.steps[0])
        losses.append(float(trainer.state.log_history[0]["loss"]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert_equal(steps[1], steps[0], 1e-5)


def test_plain_sft_trainer_says_what_it_loses(tmp_path):
    with pytest.warns(UserWarning, match="AuxiliaryLossMixin"):
        sft(expert_model(), tmp_path, trainer=trl.SFTTrainer, remove_unused_columns=False)


@pytest.mark.parametrize("routing", ["learned", "language"])
@pytest.mark.parametrize("rows", [DOCUMENTS, as_text(DOCUMENTS)], ids=["tokens", "text"])
def test_peft_config_upcycles_the_model(tmp_path, rows, routing, holds):
    callbacks = [RoutingCallback()]
    trainer = sft(
        base_model(), tmp_path, rows=rows, peft_config=moe_config(routing=routing), callbacks=callbacks, max_steps=5
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    holds(float(logs[-1]["loss"]) - float(logs[0]["loss"]), below=0)
    assert "expert_0_share/uralic" in logs[0]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("moe_delta_" in name for name in trained)


def test_defaults_of_sft_and_packing(tmp_path):
    """bf16 autocast and gradient checkpointing, which SFTConfig switches on, and packing by the collator."""
    trainer = sft(expert_model(), tmp_path, packing=True, max_steps=2, bf16=True)
    assert trainer.args.gradient_checkpointing
    assert all(torch.isfinite(torch.tensor(float(log["loss"]))) for log in trainer.state.log_history if "loss" in log)


def test_prompts_without_targets(tmp_path):
    """Only completions are targets; the labels that TRL makes reach the model."""
    rows = [{"prompt": "w5 w6 ", "completion": "w7 w8", "language": "hu"}]
    trainer = sft(expert_model(), tmp_path, rows=rows)
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 2]]
    assert batch["language_ids"].tolist() == [[0, 0, 0, 0, 0]]


def test_afterwards_the_model_generates_and_unloads(tmp_path):
    model = expert_model(routing="language")
    sft(model, tmp_path)
    model.eval()
    tokens = token_batch(1, 4)
    arguments = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, "do_sample": False}
    by_code = model.generate(input_ids=tokens, language="az", **arguments)
    by_id = model.generate(input_ids=tokens, language_ids=torch.tensor([3]), **arguments)
    assert by_code.equal(by_id)
    assert_unloads(model)


@pytest.mark.filterwarnings("ignore:This training pass returned no loss")
def test_plain_sft_trainer_leaves_a_model_that_unloads(tmp_path):
    model = expert_model()
    sft(model, tmp_path, trainer=trl.SFTTrainer, remove_unused_columns=False)
    assert_unloads(model.eval())


def assert_unloads(model):
    tokens = token_batch(1, 4)
    with torch.no_grad():
        assert model.unload()(tokens).logits.equal(base_model()(tokens).logits)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning")
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_step_without_any_target_teaches_nothing(tmp_path, smoothing):
    rows = [{**row, "labels": list(row["input_ids"])} for row in DOCUMENTS]
    rows[1]["labels"][1:] = [-100] * (len(rows[1]["labels"]) - 1)  # the first is nobody's target, but TRL keeps the row
    recorder = GradientRecorder()
    model = expert_model(load_balancing_coef=1.0)
    arguments = {"max_steps": 4, "per_device_train_batch_size": 1, "label_smoothing_factor": smoothing}
    sft(model, tmp_path, rows=rows, callbacks=[recorder], **arguments)
    sizes = [sum(gradient.abs().sum() for gradient in step.values()) for step in recorder.steps]
    assert [size == 0 for size in sizes].count(True) == 1
    assert all(p.isfinite().all() for p in model.parameters())
