"""`load`: whatever the package made, by its folder, as one call."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

import greek
import peft_moe_delta
from builders import logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta.errors import CheckpointError
from served.pico_export import WORDS, with_tokenizer


@pytest.fixture
def made(tmp_path):
    """A folder of a base, a post-trained model, and an adapter over the base; and the adapter in memory."""
    base = pico(vocab_size=WORDS)
    for name, model in (("base", base), ("chat", perturbed(base))):
        model.save_pretrained(tmp_path / name)
        with_tokenizer(tmp_path / name)
    model = upcycle(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), trained=True)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


def test_an_adapter_loads_over_its_base_with_its_tokenizer(made):
    folder, model = made
    loaded, tokenizer = peft_moe_delta.load(folder / "adapter")
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, token_batch()), logits(model, token_batch()))
    assert len(tokenizer) == len(greek.make_tokenizer(vocab_size=WORDS)) and tokenizer.chat_template
    trainable, _ = peft_moe_delta.load(folder / "adapter", is_trainable=True, dtype=torch.bfloat16)
    assert {p.requires_grad for layer in moe_layers(trainable) for p in layer.moe_delta_router.parameters()} == {True}
    assert trainable.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_base_that_moved_is_named_and_given(made):
    folder, model = made
    shutil.move(folder / "base", folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"adapter' lies over '.*base', which does not load.*give it as `base`"):
        peft_moe_delta.load(folder / "adapter")
    loaded, _ = peft_moe_delta.load(folder / "adapter", base=folder / "elsewhere")
    assert torch.equal(logits(loaded, token_batch()), logits(model, token_batch()))
    with pytest.raises(CheckpointError, match="Cannot load a model or adapter from '.*nowhere'"):
        peft_moe_delta.load(folder / "nowhere")


def test_grafted_adapters_and_exports_load_too(made):
    folder, _ = made
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = upcycle(
        base, trained=True, routing="language", languages={"en": "original", "hu": "uralic"}, experts={"uralic": 2}
    )
    model.merge_and_graft(folder / "chat", remote_code=True).save_pretrained(folder / "own_code")
    model.graft(folder / "chat").save_pretrained(folder / "grafted")
    grafted, _ = peft_moe_delta.load(folder / "grafted")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        peft_moe_delta.load(folder / "own_code")
    export, tokenizer = peft_moe_delta.load(folder / "own_code", trust_remote_code=True)
    assert isinstance(export, PreTrainedModel) and tokenizer.chat_template
    expected = logits(grafted, token_batch(), language="hu")
    torch.testing.assert_close(logits(export, token_batch(), language="hu"), expected, atol=1e-5, rtol=0)


def test_new_tokens_of_an_adapter_are_in_its_tokenizer(made):
    folder, _ = made
    model, tokenizer = peft_moe_delta.load(folder / "adapter", is_trainable=True)
    tokens = peft_moe_delta.propose_tokens(greek.GREEK, tokenizer, 5)
    peft_moe_delta.extend_vocabulary(model, tokenizer, tokens)
    model.save_pretrained(folder / "longer")
    for beside in (False, True):  # the adapter alone, and with its own tokenizer
        if beside:
            tokenizer.save_pretrained(folder / "longer")
        loaded, own = peft_moe_delta.load(folder / "longer")
        assert own.get_vocab() == tokenizer.get_vocab()
        batch = own(greek.GREEK[0], return_tensors="pt")["input_ids"]
        assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))


def test_the_readme_of_an_adapter_says_how_to_load_it(made):
    folder, model = made
    readme = folder / "adapter/README.md"
    assert "import peft_moe_delta" in readme.read_text() and "peft_moe_delta.load(" in readme.read_text()
    readme.write_text("---\nlibrary_name: peft\n---\nMine.\n")
    model.save_pretrained(folder / "adapter")
    assert "Mine." in readme.read_text() and "import peft_moe_delta" not in readme.read_text()
