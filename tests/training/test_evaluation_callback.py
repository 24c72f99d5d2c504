"""Measuring while training reaches every reporter, TensorBoard's event file among them, and changes no training."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_moe_delta import LanguageCollator, MoeDeltaConfig, RoutingCallback
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.evaluation.callback import LanguageEvaluationCallback
from recipe.pico_recipe import SENTENCES, pico_model, pico_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
GROUPS = {"en": "original", "hu": "uralic", "el": "greek"}
HELD_OUT = {code: [f"{sentence} again"] for code, sentence in SENTENCES.items()}


def trained(tmp_path, *, measured: bool, report_to: list[str], routing: str = "learned") -> Trainer:
    torch.manual_seed(0)
    tokenizer = pico_tokenizer()
    config = MoeDeltaConfig(languages=GROUPS, experts={"uralic": 1, "greek": 1}, routing=routing)
    model = get_peft_model(pico_model(), config)
    documents = [{"text": SENTENCES[code], "language": code} for code in ("hu", "el")] * 10
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=5, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=2,
        report_to=report_to, use_cpu=True, save_strategy="no", seed=0,
    )  # fmt: skip
    collator = LanguageCollator(tokenizer, model)
    trainer = Trainer(model, arguments, train_dataset=documents, data_collator=collator, callbacks=[RoutingCallback()])
    if measured:
        trainer.add_callback(LanguageEvaluationCallback(trainer, tokenizer, HELD_OUT, every=2))
    trainer.train()
    return trainer


def test_figures_reach_tensorboards_event_file(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trained(tmp_path, measured=True, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    model, tokenizer = trainer.model, pico_tokenizer()
    for code, texts in HELD_OUT.items():
        (name,) = (tag for tag in events.Tags()["scalars"] if tag.endswith(f"bits_per_byte/{code}"))
        curve = events.Scalars(name)
        assert [point.step for point in curve] == [2, 4, 5]
        now = bits_per_byte(model, tokenizer, texts, language=code).value
        assert curve[-1].value == pytest.approx(now, rel=1e-5)
        shares = [tag for tag in events.Tags()["scalars"] if f"routing_share/{code}/" in tag]
        assert len(shares) == 3
        assert sum(events.Scalars(tag)[-1].value for tag in shares) == pytest.approx(1)


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_measuring_changes_nothing(tmp_path, routing):
    """Not the weights, nor what the Trainer and the other callback log."""
    plain, measured = (trained(tmp_path, measured=m, report_to=[], routing=routing) for m in (False, True))
    for (name, before), after in zip(
        plain.model.state_dict().items(), measured.model.state_dict().values(), strict=True
    ):
        assert torch.equal(before, after), name
    losses = [[row for row in t.state.log_history if "loss" in row] for t in (plain, measured)]
    assert losses[0] == losses[1] != []
    assert sum("bits_per_byte/hu" in row for row in measured.state.log_history) == 3


def test_bad_arguments_are_named(tmp_path):
    for texts, every in (({}, 1), (HELD_OUT, 0)):
        with pytest.raises(DataError, match="expected at least one language and at least one step"):
            LanguageEvaluationCallback(None, pico_tokenizer(), texts, every=every)
