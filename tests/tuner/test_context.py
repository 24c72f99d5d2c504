"""The side channel beyond one device and one model: a second device is played by `meta`, which has shapes only."""

import copy
import threading

import pytest
import torch

from builders import HIDDEN, LANGUAGES, logits, pico, token_batch, upcycle
from peft_moe_delta.errors import LanguageError, PeftMoeDeltaError
from peft_moe_delta.languages import LanguageTable
from peft_moe_delta.losses import SummedLoss
from peft_moe_delta.tuner.context import LOOK_EVERY, ForwardContext
from peft_moe_delta.tuner.passes import ForwardState

CPU, OTHER = torch.device("cpu"), torch.device("meta")
TABLE = LanguageTable.build(LANGUAGES)


@pytest.mark.parametrize("known", [{"language": "hu"}, {"language_ids": torch.tensor([[0, 1, -100]])}], ids=str)
def test_every_layer_gets_groups_on_its_own_device(known):
    state = ForwardState((1, 3), **known)
    for device in (CPU, OTHER, CPU):
        group_T, _ = state.groups(TABLE, device)
        assert group_T.device == device


@pytest.mark.parametrize("mask_T", [None, torch.tensor([True, True, False])], ids=["no padding", "padding"])
def test_padding_is_known_on_the_device_of_the_rows(mask_T):
    assert ForwardState((1, 3), mask_T=mask_T).counted(torch.zeros(3, 2, device=OTHER)).device == OTHER


@pytest.mark.parametrize("share", [1.0, torch.tensor(0.25)], ids=["number", "tensor"])
def test_layers_on_several_devices_share_one_loss(share):
    state = ForwardState((1, 3), share=share, recording=True)
    for device in (OTHER, CPU):
        state.expect({"z": 0}, device)
        one, none = torch.tensor(1.0, device=device), torch.zeros(0, device=device)
        state.deposit("z", 1.0, SummedLoss(one, 3 * one, none))
    loss = state.auxiliary_loss()
    assert (loss.device, loss.shape) == (OTHER, ())


def test_layers_on_several_devices_share_their_statistics():
    context = ForwardContext()
    for device in (OTHER, CPU):
        context.record("share", torch.tensor(1.0, device=device), torch.tensor(2, device=device))
    assert {part.device for part in context.statistics["share"]} == {OTHER}


def test_a_model_is_copied_after_a_pass_whose_loss_nobody_took():
    model = upcycle(pico(), trained=True).train()
    with pytest.warns(UserWarning, match="returned no loss"):
        model(input_ids=token_batch())
    copied = copy.deepcopy(model)
    assert model.base_model.auxiliary_loss is not None
    assert copied.base_model.auxiliary_loss is None
    assert logits(copied.eval(), token_batch()).equal(logits(model.eval(), token_batch()))


def test_a_language_and_ids_together_are_refused():
    model = upcycle(pico())
    with pytest.raises(LanguageError, match="Both `language` \\('hu'\\) and `language_ids`"):
        model(input_ids=torch.tensor([[3, 4]]), language="hu", language_ids=torch.tensor([0]))


@pytest.mark.parametrize("routing", ["learned", "language"])
def test_a_layer_without_tokens_gives_none_back(routing):
    model = upcycle(pico(), routing=routing).eval()
    layer = next(iter(model.layers().values()))
    model.set_language("hu")
    with torch.no_grad():
        assert layer(torch.zeros(1, 0, HIDDEN)).shape == (1, 0, HIDDEN)


def test_a_data_parallel_copy_is_refused():
    replica = upcycle(pico()).get_base_model()._replicate_for_data_parallel()
    with pytest.raises(PeftMoeDeltaError, match="one process a GPU"):
        replica(input_ids=token_batch())


def test_threads_may_call_one_model_in_several_languages_at_once():
    model, tokens = upcycle(pico(), trained=True, routing="language"), token_batch()
    expected = {code: logits(model, tokens, language=code) for code in LANGUAGES}
    wrong, meet = [], threading.Barrier(len(LANGUAGES))
    # A layer waits until every thread is in the middle of its pass.
    handle = next(iter(model.layers().values())).register_forward_pre_hook(lambda *_: print(meet.wait(30)))

    def call(code):
        for _ in range(5):
            if not torch.equal(logits(model, tokens, language=code), expected[code]):
                wrong.append(code)

    threads = [threading.Thread(target=call, args=(code,)) for code in LANGUAGES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not meet.broken and wrong == []
    assert ForwardContext.of(model.get_base_model()).current is None


def test_compiled_code_refuses_a_second_thread_inside_a_pass(monkeypatch):
    context = ForwardContext()
    context.current = ForwardState((1, 1))
    other = threading.Thread(target=lambda: setattr(context, "current", ForwardState((1, 2))))
    other.start()
    other.join()
    assert context.current.shape == (1, 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(PeftMoeDeltaError, match="take turns"):
        assert context.current


class OnAccelerator:
    """Whether a loss was finite, on a device that has to be waited for; counts how often somebody does."""

    device = OTHER

    def __init__(self, value):
        self.value, self.waits = value, 0

    def __bool__(self):
        self.waits += 1
        return self.value


def test_a_training_step_does_not_wait_for_its_device():
    """A device is played by an object, as in the tests above."""
    context, model = ForwardContext(), pico()
    found = []
    for step in range(3 * LOOK_EVERY):
        if context._suspect is None:
            context._suspect = OnAccelerator(False)
        context._unseen += 1
        found.append(context._suspect)
        context._refuse_diverged(model)
        assert (context._suspect is None) == ((step + 1) % LOOK_EVERY == 0)
    assert sum(flag.waits for flag in set(found)) == 3


@pytest.mark.parametrize("finite", [0, 3])
def test_a_loss_that_was_not_finite_is_remembered_until_somebody_looks(finite):
    model = upcycle(pico(), trained=True).train()
    context, tokens = ForwardContext.of(model.get_base_model()), token_batch()
    router = next(p for name, p in model.named_parameters() if "moe_delta_router" in name)
    context._refuse_diverged, look = lambda model: None, context._refuse_diverged
    value, router.data[0, 0] = router.data[0, 0].clone(), torch.nan
    model(tokens, labels=tokens)
    router.data[0, 0] = value
    for _ in range(finite):
        model(tokens, labels=tokens)
    assert bool(context._suspect) and context._unseen == 1 + finite
    router.data[0, 0] = torch.nan
    with pytest.raises(PeftMoeDeltaError, match=r"Training has diverged: .*moe_delta_router.* is not finite"):
        look(model)
