"""The plain `Trainer`: the columns it keeps, the figures in its log, the lines a user writes."""

import math
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from builders import LANGUAGES, moe_layers
from chance import shifted
from peft_moe_delta import LanguageCollator, MoeDeltaConfig, RoutingCallback
from training.common import base_model, context_of, documents, expert_model, make_tokenizer, train

CODES = list(LANGUAGES)
BATCH = documents([7, 5, 3, 6], ["en", "hu", "az", "fi"])


def router_logits(model, batch):
    """Router logits of every layer, (tokens, experts), and the group of every token; padding left out."""
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())) for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    kept = batch["attention_mask"].bool()
    groups = [
        LANGUAGES[CODES[i]] for i, row in zip(batch["language_ids"][:, 0], kept, strict=True) for _ in range(row.sum())
    ]
    weights = [layer.moe_delta_router["default"].weight for layer in moe_layers(model)]
    return [x[kept] @ w.T for x, w in zip(inputs, weights, strict=True)], groups


def share_on_zero(logits, groups, group):
    """Of the group's tokens over all layers, those whose first choice is expert 0."""
    firsts = [row.argmax().item() for layer in logits for row, g in zip(layer, groups, strict=True) if g == group]
    return firsts.count(0) / len(firsts)


def balance(logits):
    """Learned routing, top-2 of 4: `4 sum_e f_e P_e`, mean over layers."""
    losses = []
    for layer in logits:
        p = layer.softmax(-1)
        f = torch.stack([(p.topk(2).indices == e).sum() for e in range(4)]) / (2 * len(p))
        losses.append(4 * (f * p.mean(0)).sum().item())
    return sum(losses) / len(losses)


def prior(logits, groups):
    """Mean of `-log p(0)` over original tokens and layers."""
    own = [layer.softmax(-1)[i, 0].item() for layer in logits for i, g in enumerate(groups) if g == "original"]
    return sum(-math.log(p) for p in own) / len(own)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_figures_in_the_log(tmp_path, checkpointing):
    model = expert_model(stage="review", load_balancing_coef=0.01)
    batch = LanguageCollator(make_tokenizer(), model)(BATCH)
    logits, groups = router_logits(model, batch)
    arguments = {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 2, "gradient_checkpointing": checkpointing}
    log = train(model, BATCH, tmp_path, callbacks=[RoutingCallback()], **arguments).state.log_history[0]
    expected = {f"expert_0_share/{g}": share_on_zero(logits, groups, g) for g in ("original", "uralic", "turkic")}
    expected |= {"load_balancing_loss": balance(logits), "language_prior_loss": prior(logits, groups)}
    assert {name: log[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert len({*expected.values()}) == len(expected)  # none stands in for another
    assert log["loss"] > 0


def test_figures_without_languages(tmp_path):
    """Learned routing needs no languages: one share for all."""
    model = expert_model()
    data = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    arguments = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RoutingCallback()])
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 <= log["expert_0_share"] <= 1 and "load_balancing_loss" in log
    assert not [name for name in log if name.startswith("expert_0_share/")]


def test_figures_are_read_once_and_by_training_logs_only(tmp_path):
    """An evaluation between two training logs has no such figures and takes none away."""
    model = expert_model()
    collator = LanguageCollator(make_tokenizer(), model)
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 4}
    arguments |= {"report_to": [], "use_cpu": True, "learning_rate": 0.0}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **arguments),
        train_dataset=BATCH,
        eval_dataset=BATCH,
        data_collator=collator,
        callbacks=[RoutingCallback()],
    )
    trainer.train()
    history = trainer.state.log_history
    assert [("load_balancing_loss" in log) for log in history] == [("loss" in log) for log in history]
    assert sum("load_balancing_loss" in log for log in history) == 2
    assert context_of(model).statistics == {}


def test_a_training_does_not_log_what_an_earlier_one_left(tmp_path):
    model = expert_model(stage="review")
    arguments = {"callbacks": [RoutingCallback()], "logging_steps": 2}
    train(model, documents([5], ["en"]), tmp_path, max_steps=3, **arguments)
    assert any("expert_0_share/original" in names for names in context_of(model).statistics)
    log = train(model, documents([5], ["hu"]), tmp_path, max_steps=2, **arguments).state.log_history[0]
    assert "expert_0_share/uralic" in log and "expert_0_share/original" not in log


def test_who_else_reads_the_figures(tmp_path):
    """Callbacks that come later, and with them what Trainer prints."""

    class Reader(TrainerCallback):
        seen = False

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen |= "load_balancing_loss" in logs

    earlier, later = Reader(), Reader()
    train(expert_model(), BATCH, tmp_path, callbacks=[earlier, RoutingCallback(), later])
    assert (earlier.seen, later.seen) == (False, True)


@pytest.mark.parametrize("data", ["Dataset", "list"])
@pytest.mark.parametrize("column", ["input_ids", "text"])
def test_trainer_keeps_the_columns_the_collator_reads(tmp_path, data, column):
    model = expert_model(routing="language")
    rows = [{**document, "source": "somewhere"} for document in BATCH]
    if column == "text":
        rows = [{"text": " ".join(f"w{i}" for i in row.pop("input_ids")), **row} for row in rows]
    trainer = train(model, Dataset.from_list(rows) if data == "Dataset" else rows, tmp_path)
    read = []
    collate = trainer.data_collator
    trainer.data_collator = lambda features: read.extend(features) or collate(features)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["language_ids"][:, 0].tolist()) == [0, 1, 2, 3]
    assert all(set(document) == {column, "language"} for document in read)


def test_the_lines_a_user_writes(tmp_path, holds):
    tokenizer, base = make_tokenizer(), base_model()
    text = {"hu": "w10 w11 w12 w13 w14", "el": "w20 w21 w22 w23", "en": "w30 w31 w32", "es": "w40 w41 w42 w43"}
    new_language_text = Dataset.from_list([{"text": text[code], "language": code} for code in ("hu", "el")] * 4)
    review_mix = Dataset.from_list([{"text": text[code], "language": code} for code in text] * 2)
    args = TrainingArguments(
        tmp_path, max_steps=10, learning_rate=3e-2, logging_steps=1, report_to=[], use_cpu=True, seed=shifted(42)
    )

    model = get_peft_model(
        base,
        MoeDeltaConfig(
            languages={"en": "original", "es": "original", "hu": "expanded", "el": "expanded"},
            experts={"expanded": 3},
            top_k=2,
            routing="learned",
        ),
    )
    expansion = Trainer(model, args, train_dataset=new_language_text, data_collator=LanguageCollator(tokenizer, model))
    expansion.train()
    model.start_review()
    args.max_steps = 60  # routers alone, so each step does less
    review = Trainer(model, args, train_dataset=review_mix, data_collator=LanguageCollator(tokenizer, model))
    review.train()
    model.save_pretrained(tmp_path / "my-adapter")

    for name, trainer in ("expansion", expansion), ("review", review):
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert len(losses) == trainer.state.max_steps
        first, last = losses[:5], losses[-5:]  # one batch is easier than another
        holds(fmean(last) - fmean(first), below=0, name=name)
