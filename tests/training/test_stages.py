"""Who trains when: experts and routers in expansion, routers alone in review, the base model never."""

import pytest
import torch
from peft import PeftModel

from builders import LANGUAGES, moe_config, token_batch
from peft_moe_delta import LanguageCollator
from peft_moe_delta.errors import PeftMoeDeltaError
from training.common import base_model, documents, expert_model, make_tokenizer, parameters, train

TOKENS = token_batch(4, 6)
IDS = torch.arange(len(LANGUAGES))


def step(model, optimizer):
    optimizer.zero_grad()
    model.train()(input_ids=TOKENS, labels=TOKENS, language_ids=IDS).loss.backward()
    optimizer.step()


def optimizer_of(model, everything=False):
    chosen = [p for p in model.parameters() if everything or p.requires_grad]
    return torch.optim.AdamW(chosen, lr=0.1, weight_decay=0.5)


def changed(before, model):
    return {name for name, p in parameters(model).items() if not p.equal(before[name])}


def named(model, part):
    found = {name for name, _ in model.named_parameters() if part in name}
    assert found
    return found


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_expansion_trains_experts_and_routers(routing, rank):
    model = expert_model(routing=routing, expert_rank=rank, top_k=2)
    model.start_expansion()
    expected = named(model, "moe_delta_experts") | named(model, "moe_delta_router")
    assert trainable(model) == expected
    before = parameters(model)
    step(model, optimizer_of(model, everything=True))
    assert changed(before, model) == expected


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_review_trains_routers_alone(routing, rank):
    """With the optimizer of the expansion, whose momentum and weight decay must not reach the experts either."""
    model = expert_model(routing=routing, expert_rank=rank)
    optimizer = optimizer_of(model, everything=True)
    step(model, optimizer)
    model.start_review()
    assert trainable(model) == named(model, "moe_delta_router")
    before = parameters(model)
    step(model, optimizer)
    step(model, optimizer)
    assert changed(before, model) == named(model, "moe_delta_router")
    model.start_expansion()
    assert trainable(model) == named(model, "moe_delta_experts") | named(model, "moe_delta_router")


def test_hard_routing_to_single_experts_trains_no_router():
    """Nobody chooses and no prior teaches, so a router's gradient would be missing, which DDP does not forgive."""
    model = expert_model(routing="language", experts={"uralic": 1, "turkic": 1}, top_k=1)
    assert trainable(model) == named(model, "moe_delta_experts")
    model.start_review()
    assert trainable(model) == named(model, "moe_delta_router")


def to_second_adapter(model):
    model.add_adapter("second", moe_config())
    model.set_adapter("second")


SWITCHES = {
    "review": lambda model: model.start_review(),
    "second adapter": to_second_adapter,
    "new group": lambda model: model.add_languages({"sw": "bantu"}, {"bantu": 1}),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_a_reused_trainer_says_that_it_would_train_nothing(switch, tmp_path):
    model = expert_model(routing="language", experts={"uralic": 1, "turkic": 1})
    trainer = train(model, documents([6] * 8, list(LANGUAGES)), tmp_path, max_steps=2)
    switch(model)
    trainer.train_dataset = data = documents([6] * 8, list(model.active_config.languages))
    trainer.data_collator = LanguageCollator(make_tokenizer(), model)
    before = parameters(model)
    with pytest.raises(PeftMoeDeltaError, match="made before the stage.*a new Trainer"):
        trainer.train()
    assert not changed(before, model)
    train(model, data, tmp_path, max_steps=2)
    assert changed(before, model)


def test_a_reused_trainer_trains_what_its_optimizer_holds(tmp_path):
    model = expert_model(routing="learned")
    trainer = train(model, documents([6] * 8, list(LANGUAGES)), tmp_path, max_steps=2)
    model.start_review()
    before = parameters(model)
    trainer.train()
    assert changed(before, model) == named(model, "moe_delta_router")


def test_an_optimizer_of_the_review_lacks_the_experts():
    model = expert_model(routing="learned")
    model.start_review()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    model.start_expansion()
    with pytest.raises(PeftMoeDeltaError, match="moe_delta_experts"):
        step(model, optimizer)
    step(model, optimizer_of(model))


def test_several_optimizers_may_share_what_trains():
    model, other = expert_model(routing="language"), expert_model()
    parts = [[p for n, p in model.named_parameters() if part in n] for part in ("experts", "router")]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
    bystander = optimizer_of(other)
    for stage in (model.start_expansion, model.start_review, model.start_expansion):
        stage()
        before = parameters(model)
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS, language_ids=IDS).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        step(other, bystander)
        assert changed(before, model) == {n for n in trainable(model) if model.get_parameter(n).grad is not None}


def toggle_layers(model):
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def toggle_context(model):
    with model.disable_adapter():
        pass


DISTURBANCES = {
    "set_adapter": lambda model: model.set_adapter("default"),
    "tuner.set_adapter": lambda model: model.base_model.set_adapter("default"),
    "enable_adapter_layers": toggle_layers,
    "disable_adapter": toggle_context,
    "eval": lambda model: model.eval(),
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
@pytest.mark.parametrize("stage", ["expansion", "review"])
def test_the_stage_survives(stage, disturb):
    model = expert_model()
    getattr(model, f"start_{stage}")()
    before = trainable(model)
    disturb(model)
    assert trainable(model) == before
    assert model.active_config.record.stage == stage


def test_each_adapter_keeps_its_own_stage():
    model = expert_model()
    model.start_review()
    first = trainable(model)
    model.add_adapter("second", moe_config())
    model.set_adapter("second")
    assert trainable(model) == named(model, ".second.")
    model.set_adapter("default")
    assert trainable(model) == first


def test_the_stage_is_saved(tmp_path):
    model = expert_model()
    model.start_review(language_prior_coef=0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    assert loaded.active_config.language_prior == 0.3
    assert not trainable(PeftModel.from_pretrained(base_model(), tmp_path))
