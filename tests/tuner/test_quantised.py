"""Low-rank experts over a quantised base: everything runs over it, and everything that needs floats says so."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.gguf.utils import GgufLinear

from builders import logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta.errors import ArchitectureError, CheckpointError, GraftError
from peft_moe_delta.evaluation import evaluate_languages
from peft_moe_delta.graft.files import graft_checkpoint
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.matrices import squared_norm
from training.common import documents, make_tokenizer, train

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Whole blocks of 64, which bitsandbytes' 4-bit kernel needs on CPUs with AVX512-BF16."""
IDS = torch.tensor([0, 1, 3])


def four_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # outliers depend on the other rows


def torchao(name="Int8WeightOnlyConfig"):
    pytest.importorskip("torchao")
    return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


KINDS = {"bitsandbytes 4 bit": four_bit, "bitsandbytes 8 bit": eight_bit, "torchao int8": torchao}


@pytest.fixture(params=list(KINDS))
def quantisation(request):
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a float base and its post-trained sibling."""
    folder = tmp_path_factory.mktemp("pair")
    pico(**SIZES).save_pretrained(folder / "base")
    perturbed(pico(**SIZES)).save_pretrained(folder / "post")
    make_tokenizer().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "post")
    return folder


def load(folder, quantisation=None):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)


def stored(parameter):
    """What can be compared: torchao's tensors know no equality of their own."""
    return parameter.dequantize() if hasattr(parameter, "__tensor_flatten__") else parameter


def trained_in(folder, base):
    """A few steps of Trainer over a base, with experts of rank 4, saved. Returns the model."""
    model = upcycle(base, expert_rank=4, routing="language", experts={"uralic": 1, "turkic": 1}, top_k=1).train()
    train(model, documents([9] * 8, ["hu", "en", "az", "fi"]), folder / "run", max_steps=2, learning_rate=0.05)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def test_training_saving_generating_and_evaluating_over_a_quantised_base(quantisation, pair, tmp_path):
    base = load(pair / "base", quantisation)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = trained_in(tmp_path, base)
    for name, parameter in before.items():
        now = base.get_parameter(name.replace(".mlp.", ".mlp.base_layer."))
        assert not now.requires_grad and torch.equal(stored(now), stored(parameter)), name
    for layer in moe_layers(model):
        for linear in layer.moe_delta_experts["default"][0].children():
            assert not hasattr(linear, "B") or (linear.B.dtype == torch.float32 and linear.B.any())
    expected = logits(model, token_batch(), language_ids=IDS)
    again = PeftModel.from_pretrained(load(pair / "base", quantisation), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, token_batch(), language_ids=IDS), expected)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, token_batch()), expected)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "language_ids": IDS}
    prompt = {"input_ids": token_batch(), "attention_mask": torch.ones_like(token_batch())}
    assert torch.equal(model.generate(**prompt, **options), again.generate(**prompt, **options))
    report = evaluate_languages({"quantised": (model, make_tokenizer())}, {"hu": ["w5 w6 w7", "w8 w9"]})
    assert [math.isfinite(score.value) for score in report.scores] == [True]


def test_untrained_experts_leave_a_quantised_base_as_it_is(quantisation, pair):
    expected = logits(load(pair / "base", quantisation), token_batch())
    for changes in ({}, {"attention_experts": "shared_kv"}, {"attention_experts": "full"}):
        model = upcycle(load(pair / "base", quantisation), expert_rank=4, **changes)
        torch.testing.assert_close(logits(model, token_batch()), expected, atol=2e-2, rtol=0)


def test_a_graft_from_files_is_the_graft_in_memory_of_the_float_models(quantisation, pair, tmp_path):
    trained_in(tmp_path, load(pair / "base", quantisation))
    adapter, folders = tmp_path / "adapter", (pair / "base", pair / "post", tmp_path / "adapter")
    in_memory = PeftModel.from_pretrained(load(pair / "base"), adapter).merge_and_graft(pair / "post", language="hu")
    graft_checkpoint(*folders, tmp_path / "stock", language="hu")
    from_files = load(tmp_path / "stock").state_dict()
    assert from_files.keys() == in_memory.state_dict().keys()
    assert all(torch.equal(from_files[name], tensor) for name, tensor in in_memory.state_dict().items())
    graft_checkpoint(*folders, tmp_path / "grafted", target="adapter")
    grafted = PeftModel.from_pretrained(load(pair / "post", quantisation), tmp_path / "grafted").eval()
    close = logits(PeftModel.from_pretrained(load(pair / "post"), tmp_path / "grafted"), token_batch(), language="hu")
    found = logits(grafted, token_batch(), language="hu")
    assert (found - close).square().mean() < 0.1 * close.var()


def test_an_adapter_moves_between_a_base_and_its_quantised_copy_and_to_no_other(quantisation, pair, tmp_path):
    upcycle(load(pair / "base"), expert_rank=4).save_pretrained(tmp_path / "float")
    upcycle(load(pair / "base", quantisation), expert_rank=4).save_pretrained(tmp_path / "packed")
    PeftModel.from_pretrained(load(pair / "base", quantisation), tmp_path / "float")
    PeftModel.from_pretrained(load(pair / "base"), tmp_path / "packed")
    for folder, other in (("float", load(pair / "post", quantisation)), ("packed", load(pair / "post"))):
        with pytest.raises(CheckpointError, match="other base weights: of 21 tensors 7 differ"):
            PeftModel.from_pretrained(other, tmp_path / folder)


def test_what_needs_the_float_weights_is_refused_with_what_to_do(quantisation, pair, tmp_path):
    with pytest.raises(ArchitectureError, match=r"quantised \(gate_proj.weight.*expert_rank=16"):
        upcycle(load(pair / "base", quantisation))
    model = upcycle(load(pair / "base", quantisation), expert_rank=4)
    for graft in (model.graft, model.merge_and_graft):
        with pytest.raises(GraftError, match=r"quantised.*graft from files.*peft-moe-delta graft"):
            graft(pair / "post")
    with pytest.raises(GraftError, match="quantised"):
        to_stock(model)
    with pytest.raises(ArchitectureError, match="not at hand"):
        moe_layers(model)[0].expert_weights("default", 1)
    float_model = upcycle(load(pair / "base"), expert_rank=4)
    with pytest.raises(GraftError, match="quantised"):
        float_model.merge_and_graft(load(pair / "post", quantisation))
    model.save_pretrained(tmp_path / "adapter")
    load(pair / "post", quantisation).save_pretrained(tmp_path / "post")
    with pytest.raises(CheckpointError, match="is quantised .*unquantised checkpoint that it was made from"):
        graft_checkpoint(pair / "base", tmp_path / "post", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # peft 0.21 uses it
def test_preparing_for_kbit_training(quantisation, pair):
    batch = {"input_ids": token_batch(), "labels": token_batch(), "language_ids": IDS}
    gradients = []
    for prepare in (False, True):
        base = load(pair / "base", quantisation)
        if prepare:
            base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        model = upcycle(base, trained=True, expert_rank=4).train()
        model(**batch).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


def test_no_quantised_map_is_called_without_rows(quantisation, pair):
    """Where hooks listen, expert 0 runs in every pass, and has no tokens of a batch of Hungarian alone."""
    model = upcycle(load(pair / "base", quantisation), expert_rank=4, routing="language")
    rows = []
    for layer in moe_layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    logits(model, token_batch(), language="hu")
    assert rows == [1, 1]


def test_a_kernel_without_gradient_evaluates_and_does_not_train(pair):
    model = upcycle(load(pair / "base", torchao("Int8DynamicActivationInt8WeightConfig")), trained=True, expert_rank=4)
    assert logits(model, token_batch()).isfinite().all()
    with pytest.raises(ArchitectureError, match="passes no gradient.*only be evaluated"):
        model.train()(input_ids=token_batch(), labels=token_batch(), language_ids=IDS)


def test_weights_repacked_for_evaluation_do_not_train(pair):
    model = upcycle(load(pair / "base", four_bit()), trained=True, expert_rank=4)
    logits(model, token_batch())
    weight = moe_layers(model)[0].base_layer.up_proj.weight
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    with pytest.raises(ArchitectureError, match="repacked.*train before you evaluate"):
        model.train()(input_ids=token_batch(), labels=token_batch(), language_ids=IDS)


def test_the_norm_of_a_quantised_weight_is_about_that_of_its_floats(quantisation, pair):
    floats, packed = (load(pair / "base", q).model.layers[0].mlp.train() for q in (None, quantisation))
    for name, linear in floats.named_children():
        if isinstance(linear, nn.Linear):
            assert squared_norm(packed.get_submodule(name)).item() == pytest.approx(
                squared_norm(linear).item(), rel=0.3
            )


def test_gpt2_whose_matrices_lie_the_other_way_round(tmp_path):
    pico("gpt2", hidden_size=64).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", four_bit())
    expected = logits(base, token_batch())
    model = upcycle(base, expert_rank=4)
    torch.testing.assert_close(logits(model, token_batch()), expected, atol=2e-2, rtol=0)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")


class Packed(nn.Module):
    """As GPTQ and AWQ keep a linear map: integers in buffers, no parameter."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 32, 48
        self.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("make", [Packed, lambda: GgufLinear(32, 48, 2)], ids=["GPTQ", "GGUF"])
def test_maps_that_are_no_linear_modules_are_refused_by_name(make, rank):
    base = pico()
    base.model.layers[1].mlp.up_proj = make()
    with pytest.raises(ArchitectureError, match=r"layers.1.mlp.up_proj is quantised as a .*bitsandbytes.*dequantised"):
        upcycle(base, expert_rank=rank)
