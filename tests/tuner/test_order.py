"""The modules of a layer run in one order, whatever a batch holds; what nobody uses costs next to nothing."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from builders import logits, moe_config, moe_layers, pico, token_batch, upcycle

CASES = {
    "learned": {"routing": "learned"},
    "language": {"routing": "language"},
    "language, one expert a group": {"routing": "language", "experts": {"uralic": 1, "turkic": 1}, "top_k": 1},
    "language, low rank": {"routing": "language", "expert_rank": 2},
    "language, prior": {"routing": "language", "language_prior_coef": 1.28},
    "classifier": {"routing": "classifier", "classifier_layers": [0, 1]},
    "classifier, review": {"routing": "classifier", "classifier_layers": [0, 1], "stage": "review"},
    "attention": {"routing": "language", "attention_experts": "full"},
    "attention, shared": {"routing": "language", "attention_experts": "shared_kv"},
}
BATCHES = [[0, 0, 0], [1, 1, 1], [3, 3, 3], [0, 1, 3], [1, 1, 3]]


@pytest.fixture(params=[False, True], ids=["alone", "process group"])
def grouped(request, tmp_path):
    """Without and with a process group."""
    if request.param:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield request.param
    if request.param:
        distributed.destroy_process_group()


def order_of(model, ids, training):
    """Names of all modules inside the first layer's MLP and attention, in the order in which they are called."""
    called = []
    inside = [(name, m) for layer in moe_layers(model)[:2] for name, m in layer.named_modules() if name]
    handles = [m.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, m in inside]
    model.train(training)
    if training:
        tokens = token_batch()
        model(input_ids=tokens, labels=tokens, language_ids=ids).loss.backward()
    else:
        logits(model, token_batch(), language_ids=ids)
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("case", CASES)
def test_modules_run_in_one_order_whatever_the_batch_holds(case, grouped):
    model = upcycle(pico(), trained=True, **CASES[case])
    found = {
        (tuple(ids), training): order_of(model, torch.tensor(ids), training)
        for ids in BATCHES
        for training in (True, False)
    }
    first = found[tuple(BATCHES[0]), True]
    assert "moe_delta_experts.default" in first
    for key, order in found.items():
        assert order == first, key
    parts = [name.split(".")[0] for name in first if name.count(".") < 2]
    if "attention" not in case:
        known = ["moe_delta_router", "moe_delta_classifier", "base_layer", "moe_delta_experts"]
        assert list(dict.fromkeys(parts)) == [part for part in known if part in parts]


@pytest.mark.parametrize("grouped", [True], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_gradients_arrive_in_one_order_where_deepspeed_takes_them_as_they_come(case, grouped):
    """ZeRO-2 adds up what comes from all processes in the order in which it comes; its mark on parameters is enough."""
    model = upcycle(pico(), trained=True, **CASES[case]).train()
    arrived = []
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        parameter._hp_mapping = None
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    orders = set()
    for ids in BATCHES:
        arrived.clear()
        tokens = token_batch()
        model(input_ids=tokens, labels=tokens, language_ids=torch.tensor(ids)).loss.backward()
        orders.add(tuple(arrived))
    assert len(orders) == 1
    assert set(*orders) == set(trained)


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(groups, training, **changes):
    """ATen operations of one forward pass through a layer with that many groups of one expert."""
    names = [f"g{i}" for i in range(groups - 1)]
    languages = {"en": "original", **{f"l{i}": name for i, name in enumerate(names)}}
    config = moe_config(languages=languages, experts=dict.fromkeys(names, 1), **changes)
    counts = []
    for layers in (1, 2):
        model = get_peft_model(pico(num_hidden_layers=layers), config).train(training)
        for layer in moe_layers(model):
            layer.router("default").weight.data.zero_()  # all tokens make the same choice: it is of few experts
        arguments = {"input_ids": token_batch(2), "labels": token_batch(2), "language_ids": torch.tensor([0, 1])}
        with torch.set_grad_enabled(training):
            model(**arguments)
            with Operations() as seen:
                model(**arguments)
        counts.append(seen.count)
    return counts[1] - counts[0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "changes",
    [
        {"routing": "language", "top_k": 1},
        {"routing": "language", "top_k": 1, "stage": "review"},
        {"routing": "learned", "stage": "review", "top_k": 2},
    ],
    ids=["language", "language, review", "learned"],
)
def test_groups_that_nobody_uses_cost_no_operations(changes, training, grouped):
    few = operations(2, training, **changes)
    for groups in (16, 128):
        assert operations(groups, training, **changes) <= 1.2 * few, groups
