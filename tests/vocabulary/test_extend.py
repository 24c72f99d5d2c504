"""New tokens in an upcycled model: which rows move, what is saved, what grafting does with them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import HIDDEN, logits, perturbed, pico, randomise, upcycle
from greek import GREEK, make_tokenizer
from peft_moe_delta import extend_vocabulary, propose_tokens
from peft_moe_delta.errors import ArchitectureError, DataError, GraftError, LanguageError, PlanError
from peft_moe_delta.tuner.vocabulary import grown_layers
from peft_moe_delta.vocabulary import TokenizerGrowth
from peft_moe_delta.vocabulary.distil import distil_rows, windows_of
from peft_moe_delta.vocabulary.fit import States, cross_entropy
from training.common import make_tokenizer as words_tokenizer

FAMILIES = ("llama", "qwen3", "gemma", "gemma3_text", "gpt2")
PADDING = 6
"""Rows of the pico models beyond the tokenizer."""


def base_model(tokenizer, family="llama", padding=PADDING, **config):
    return pico(family, vocab_size=len(tokenizer) + padding, **config)


def extended(base, tokenizer, count=20, **changes):
    """An upcycled model with new Greek tokens, and its grown tokenizer."""
    model = upcycle(base, **changes)
    grown = extend_vocabulary(model, copy.deepcopy(tokenizer), propose_tokens(GREEK, tokenizer, count))
    return model, grown


def trained(base, tokenizer, **changes):
    """As if trained: experts and new rows moved."""
    model, grown = extended(base, tokenizer, trained=True, **changes)
    for layer in grown_layers(model.base_model.model):
        randomise(layer.moe_delta_rows, 3, 0.5)
    return model, grown


def batch(tokenizer, text=GREEK[0]):
    return torch.tensor([tokenizer(text)["input_ids"]])


def train(model, tokenizer, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        ids = batch(tokenizer)
        model(input_ids=ids, labels=ids, language="hu").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rows_of(model):
    """Input rows of the new tokens, and output rows where they are not tied."""
    return [rows.weight for layer in grown_layers(model.base_model.model) for rows in layer.moe_delta_rows.values()]


# -- which rows there are and which move ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_start_as_the_mean_of_their_pieces_and_old_logits_stay(tokenizer, family, tied):
    base = base_model(tokenizer, family, tie_word_embeddings=tied)
    old = batch(tokenizer, "the cat sat")
    expected = logits(base, old)
    tables = [module.weight.detach().clone() for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    model, grown = extended(base, tokenizer, routing="language")
    found = logits(model, old, language="en")
    first, count = len(tokenizer), len(grown) - len(tokenizer)
    assert found.shape[-1] == max(expected.shape[-1], len(grown))
    assert torch.equal(found[..., :first], expected[..., :first])
    assert len(rows_of(model)) == (1 if tied else 2)
    for rows, table in zip(rows_of(model), tables, strict=False):
        assert len(rows) == count
        for row, token in zip(rows, grown.convert_ids_to_tokens(range(first, first + count)), strict=True):
            pieces = [piece.value for piece in tokenizer.backend_tokenizer.model.tokenize(token)]
            torch.testing.assert_close(row, table[tokenizer.convert_tokens_to_ids(pieces)].mean(dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_a_resized_model_computes(tokenizer, family):
    """Against transformers' own resize, with the rows copied in."""
    base = base_model(tokenizer, family, padding=0, tie_word_embeddings=False)
    resized = copy.deepcopy(base)
    model, grown = extended(base, tokenizer)
    resized.resize_token_embeddings(len(grown), mean_resizing=False)
    with torch.no_grad():
        for module, rows in zip(
            (resized.get_input_embeddings(), resized.get_output_embeddings()), rows_of(model), strict=True
        ):
            randomise_rows = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
            rows.copy_(randomise_rows)
            module.weight[len(tokenizer) :] = rows
    ids = batch(grown)
    torch.testing.assert_close(logits(model, ids), logits(resized, ids))
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, resized(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("tied", [False, True])
def test_only_new_rows_move_in_expansion_and_none_in_review(tokenizer, tied):
    base = base_model(tokenizer, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, grown = extended(base, tokenizer)
    start = [rows.detach().clone() for rows in rows_of(model)]
    train(model, grown)
    assert not any(torch.equal(rows, old) for rows, old in zip(rows_of(model), start, strict=True))
    model.start_review()
    reviewed = [rows.detach().clone() for rows in rows_of(model)]
    train(model, grown)
    assert all(torch.equal(rows, old) for rows, old in zip(rows_of(model), reviewed, strict=True))
    model.start_expansion()
    assert all(rows.requires_grad for rows in rows_of(model))
    unloaded = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unloaded.state_dict().items())
    ids = batch(tokenizer)
    assert torch.isfinite(unloaded(input_ids=ids, labels=ids).loss)


def test_without_the_adapter_it_is_the_base(tokenizer):
    base = base_model(tokenizer)
    ids = batch(tokenizer)
    expected = logits(base, ids)
    model, _ = trained(base, tokenizer)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
        assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert logits(model, ids).shape[-1] > expected.shape[-1]


def test_generation_can_say_new_tokens(tokenizer):
    model, grown = extended(base_model(tokenizer), tokenizer)
    with torch.no_grad():
        rows_of(model)[1].mul_(20)  # loud output rows
    ids = batch(grown)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=2)
    assert out[:, ids.shape[1] :].max() >= len(tokenizer)


# -- rows fitted to text ----------------------------------------------------------------------------------------------


def fitted(base, tokenizer, **changes):
    model = upcycle(base, **changes)
    tokens = propose_tokens(GREEK, tokenizer, 20)
    return model, extend_vocabulary(model, copy.deepcopy(tokenizer), tokens, texts=GREEK, language="hu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fitted_rows_predict_text_better_and_no_old_logit_moves(tokenizer, family, tied, holds):
    base = base_model(tokenizer, family, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    old = batch(tokenizer, "the cat sat")
    expected = logits(base, old)
    mean, grown = extended(copy.deepcopy(base), tokenizer, routing="language")
    model, _ = fitted(base, tokenizer, routing="language")
    first = len(tokenizer)
    found = logits(model, old, language="en")
    assert torch.equal(found[..., :first], expected[..., :first])
    assert torch.equal(found[..., len(grown) :], expected[..., len(grown) :])
    documents = [batch(grown, "<bos>" + text) for text in GREEK]
    losses = [
        sum(each(input_ids=ids, labels=ids, language="hu").loss.item() for ids in documents) / len(documents)
        for each in (mean, model)
    ]
    holds(losses[1] - losses[0], below=-0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unload().state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_distilled_rows_are_read_as_their_pieces_are(tokenizer, tied, holds):
    base = base_model(tokenizer, tie_word_embeddings=tied)
    mean, grown = extended(copy.deepcopy(base), tokenizer, routing="language")
    distilled, _ = extended(base, tokenizer, routing="language")
    spelling = TokenizerGrowth.plan(tokenizer, distilled.active_peft_config.record.new_tokens).pieces
    distil_rows(distilled.base_model, grown, GREEK, "hu", spelling)
    far = [unlike_its_pieces(model, tokenizer, grown) for model in (mean, distilled)]
    holds(far[1] / far[0], below=0.7)
    before = [rows.clone() for rows in rows_of(distilled)]
    distil_rows(distilled.base_model, grown, ["the cat"], "hu", spelling)  # no new token to learn
    assert all(torch.equal(rows, old) for rows, old in zip(rows_of(distilled), before, strict=True))
    assert all(rows.requires_grad and rows.grad is None for rows in rows_of(distilled))


def unlike_its_pieces(model, tokenizer, grown):
    """Mean square between what enters the first MLP at the end of each text, in new tokens and in known ones."""
    entered = []
    block = next(iter(model.layers().values()))
    hook = block.register_forward_pre_hook(lambda _module, args: entered.append(args[0].reshape(-1, HIDDEN)[-1]))
    for text in GREEK:
        for cut in (tokenizer, grown):
            logits(model, batch(cut, "<bos>" + text), language="hu")
    hook.remove()
    states = torch.stack(entered).view(len(GREEK), 2, -1)
    return (states[:, 0] - states[:, 1]).pow(2).mean().item()


def test_windows_by_hand():
    def cut(_texts, **_options):
        return {"input_ids": [[10, 50, 11], [12, 13]]}

    spelt = {50: [1, 2, 3]}
    assert windows_of(cut, ["two texts"], spelt, 128) == [([10, 50, 11], [10, 1, 2, 3, 11], [0, 3, 4])]
    assert windows_of(cut, ["two texts"], spelt, 5) == [([10, 50], [10, 1, 2, 3], [0, 3])]
    assert windows_of(cut, ["two texts"], spelt, 2) == [([50], [1, 2, 3], [2])]  # one token, however many pieces


def test_a_fit_is_the_same_each_time_and_leaves_rows_ready_to_train(tokenizer):
    models = [fitted(base_model(tokenizer), tokenizer, routing="language")[0] for _ in range(2)]
    for rows, again in zip(rows_of(models[0]), rows_of(models[1]), strict=True):
        torch.testing.assert_close(rows, again)
        assert rows.requires_grad and rows.grad is None


def test_the_cross_entropy_by_hand():
    """One new token beside known ones: -log of 1 / (1 + 3) where it comes, -log of 3 / (1 + 3) where not, and there
    less the known target's logit, which is left out."""
    states = States(torch.ones(2, 1), torch.full((2,), math.log(3.0)), torch.tensor([7, 2]))
    found = cross_entropy(torch.zeros(1, 1), states, first=7)
    torch.testing.assert_close(found, torch.tensor(math.log(4.0)))


def test_fitted_rows_are_saved_and_grafted_as_any_others(tokenizer, tmp_path):
    _, chat = post_trained_with_tokens(base_model(tokenizer), tokenizer, tmp_path)
    model, grown = fitted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = batch(grown)
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))
    stock = model.merge_and_graft(tmp_path / "post")
    for module, rows in zip((stock.get_input_embeddings(), stock.get_output_embeddings()), rows_of(model), strict=True):
        assert torch.equal(module.weight[len(chat) :], rows)


def test_what_cannot_be_fitted_is_refused_and_left_as_it_was(tokenizer):
    tokens = propose_tokens(GREEK, tokenizer, 3)
    model = upcycle(base_model(tokenizer), routing="language")
    for texts, language, error, message in (
        (GREEK, None, LanguageError, "language"),
        (GREEK, "xx", LanguageError, "xx"),
        ([" \n"], "hu", DataError, "list of documents"),
    ):
        with pytest.raises(error, match=message):
            extend_vocabulary(model, tokenizer, tokens, texts=texts, language=language)
    capped = upcycle(base_model(tokenizer, "gemma2", final_logit_softcapping=5.0))
    with pytest.raises(ArchitectureError, match="caps its logits"):
        extend_vocabulary(capped, tokenizer, tokens, texts=GREEK, language="hu")
    for each in (model, capped):
        assert grown_layers(each.base_model.model) is None
    assert len(tokenizer) == len(make_tokenizer())


# -- files ------------------------------------------------------------------------------------------------------------


def test_an_adapter_loads_over_the_original_base(tokenizer, tmp_path):
    base_model(tokenizer).save_pretrained(tmp_path / "base")
    model, grown = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = batch(grown)
    assert torch.equal(logits(again.eval(), ids), logits(model, ids))
    assert not any(rows.requires_grad for rows in rows_of(again))
    regrown = extend_vocabulary(again, copy.deepcopy(tokenizer))
    assert regrown.get_vocab() == grown.get_vocab()
    assert regrown(GREEK)["input_ids"] == grown(GREEK)["input_ids"]
    assert extend_vocabulary(again, regrown).get_vocab() == grown.get_vocab()  # once is enough


def test_two_adapters_have_their_own_tokens(tokenizer):
    base = base_model(tokenizer)
    ids = batch(tokenizer)
    model, grown = trained(base, tokenizer)
    model.add_adapter("plain", upcycle(base_model(tokenizer)).peft_config["default"])
    with_tokens = logits(model, ids)
    model.set_adapter("plain")
    assert logits(model, ids).shape[-1] == base.config.vocab_size
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), with_tokens)
    model.set_adapter("plain")
    model.delete_adapter("default")
    assert logits(model, ids).shape[-1] == base.config.vocab_size
    assert len(grown) > len(tokenizer)


# -- grafting ---------------------------------------------------------------------------------------------------------


def post_trained_with_tokens(base, tokenizer, folder, special=("<chat>", "</chat>")):
    """Base and post-trained checkpoints on disk; the latter has two special tokens more, in the former's padding."""
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": list(special)})
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    post = perturbed(base)
    post.resize_token_embeddings(len(chat) + 3, mean_resizing=False)
    post.save_pretrained(folder / "post")
    chat.save_pretrained(folder / "post")
    return post, chat


@pytest.mark.parametrize("tied", [False, True])
def test_both_forms_graft_by_token(tokenizer, tmp_path, tied):
    post, chat = post_trained_with_tokens(base_model(tokenizer, tie_word_embeddings=tied), tokenizer, tmp_path)
    model, grown = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    model = model.eval()
    grafted = model.graft(tmp_path / "post")
    stock = model.merge_and_graft(tmp_path / "post")
    final = extend_vocabulary(stock, copy.deepcopy(chat))
    assert final.get_vocab() == extend_vocabulary(grafted, copy.deepcopy(chat)).get_vocab()
    ids = batch(final, "<chat>" + GREEK[0] + "</chat>")
    assert ids.max() >= len(chat)
    torch.testing.assert_close(logits(stock, ids), logits(grafted, ids), atol=1e-4, rtol=0)
    new = len(grown) - len(tokenizer)
    assert stock.config.vocab_size == len(chat) + new == len(final)
    for module, table, rows in zip(
        (stock.get_input_embeddings(), stock.get_output_embeddings()),
        (post.get_input_embeddings(), post.get_output_embeddings()),
        rows_of(model) * (2 if tied else 1),
        strict=True,
    ):
        assert torch.equal(module.weight[: len(chat)], table.weight[: len(chat)])
        assert torch.equal(module.weight[len(chat) :], rows)
    stock.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(logits(again, ids), logits(stock, ids))


def test_half_a_delta_leaves_special_and_new_tokens_whole(tokenizer, tmp_path):
    base = base_model(tokenizer)
    start = base.get_input_embeddings().weight.detach().clone()
    post, chat = post_trained_with_tokens(base, tokenizer, tmp_path)
    model, _ = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    stock = model.merge_and_graft(tmp_path / "post", scale=0.5)
    table, found = post.get_input_embeddings().weight, stock.get_input_embeddings().weight
    shared = [index for token, index in tokenizer.get_vocab().items() if token not in chat.all_special_tokens]
    torch.testing.assert_close(found[shared], (start[shared] + table[shared]) / 2)
    special = chat.convert_tokens_to_ids(["<chat>", "</chat>", "<eos>"])
    assert torch.equal(found[special], table[special])
    assert torch.equal(found[len(chat) :], rows_of(model)[0])


def test_without_growth_added_special_tokens_graft_too(tokenizer, tmp_path):
    post, _chat = post_trained_with_tokens(base_model(tokenizer), tokenizer, tmp_path)
    model = upcycle(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    stock = model.merge_and_graft(tmp_path / "post")
    ids = batch(tokenizer)
    torch.testing.assert_close(logits(stock, ids), logits(post, ids), atol=5e-5, rtol=0)
    assert stock.config.vocab_size == post.config.vocab_size


def test_a_grafted_adapter_with_tokens_loads_over_the_post_trained_model(tokenizer, tmp_path):
    post_trained_with_tokens(base_model(tokenizer), tokenizer, tmp_path)
    model, _ = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    grafted = model.graft(tmp_path / "post")
    grafted.save_pretrained(tmp_path / "grafted")
    post = AutoModelForCausalLM.from_pretrained(tmp_path / "post")
    again = PeftModel.from_pretrained(post, tmp_path / "grafted").eval()
    ids = torch.tensor([[5, len(tokenizer) + 2, len(tokenizer) + 3]])
    assert torch.equal(logits(again, ids), logits(grafted, ids))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_token_that_both_sides_learnt_is_refused(tokenizer, tmp_path):
    clash = propose_tokens(GREEK, tokenizer, 1)[0]
    post_trained_with_tokens(base_model(tokenizer), tokenizer, tmp_path, special=("<chat>", clash))
    model, _ = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    with pytest.raises(GraftError, match="learnt in expansion too"):
        model.graft(tmp_path / "post")


def test_what_cannot_grow_is_refused_and_left_as_it_was(tokenizer):
    tokens = propose_tokens(GREEK, tokenizer, 3)
    with pytest.raises(DataError, match="get_peft_model first"):
        extend_vocabulary(base_model(tokenizer), tokenizer, tokens)
    with pytest.raises(PlanError, match="not that of this model"):
        extend_vocabulary(upcycle(pico()), tokenizer, tokens)
    with pytest.raises(ArchitectureError, match="modules_to_save"):
        extend_vocabulary(upcycle(base_model(tokenizer), modules_to_save=["lm_head"]), tokenizer, tokens)
    assert len(tokenizer) == len(make_tokenizer())
    model, _ = extended(base_model(tokenizer), tokenizer)
    with pytest.raises(PlanError, match="20 new tokens already"):
        extend_vocabulary(model, tokenizer, [" γάτα"])


def test_a_token_that_nothing_spells_is_refused():
    """Its row would be the mean of no rows, which is NaN."""
    model = upcycle(pico())
    with pytest.raises(DataError, match="' ' with no token at all"):
        extend_vocabulary(model, words_tokenizer(), ["w200", " "])


def test_the_tokenizer_of_another_model_is_refused(tokenizer):
    model, _ = extended(base_model(tokenizer), tokenizer)
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(DataError, match="would start them at"):
        extend_vocabulary(model, tokenizer)
