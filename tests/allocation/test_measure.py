"""Measuring: equal to brute force and to a plain training loop, whatever the batch size and padding."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from allocation.measured import TEXTS, byte_model, byte_tokenizer
from builders import FAMILIES, upcycle
from peft_moe_delta.allocation import SOURCES, LanguageStatistics, Measurement, measure_languages
from peft_moe_delta.allocation.blocks import decoder_blocks
from peft_moe_delta.allocation.states import StateMeans
from peft_moe_delta.allocation.text import Batch, batches, token_rows
from peft_moe_delta.allocation.tuning import add_gradients
from peft_moe_delta.errors import ArchitectureError, DataError

SMALL = Measurement(
    tokens=100, steps=3, step_sequences=2, sequence_length=24, learning_rate=1e-3, vector_layers=None, seed=4
)


def measured(model: nn.Module, sources=tuple(SOURCES), texts=TEXTS, batch_size=4, **changes) -> LanguageStatistics:
    measurement = Measurement(**{**vars(SMALL), **changes})
    return measure_languages(
        model, byte_tokenizer(), texts, sources=sources, measurement=measurement, batch_size=batch_size
    )


def rows_of(language: str, tokens: int = SMALL.tokens) -> list[list[int]]:
    return token_rows(byte_tokenizer(), TEXTS[language], language, tokens=tokens, sequence_length=24, seed=SMALL.seed)


def mlp_inputs(model: nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    """(tokens, H) at each layer's MLP, a row at a time, so without padding."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, held=held: held.append(inputs[0][0].double()))
        for layer, held in zip(model.model.layers, seen, strict=True)
    ]
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return [torch.cat(held) for held in seen]


def matrices(model: nn.Module) -> list[list[torch.Tensor]]:
    return [[p for p in layer.mlp.parameters() if p.dim() == 2] for layer in model.model.layers]


def concatenated(tensors) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy()


def test_similarity_is_the_mean_cosine_of_all_pairs_of_tokens():
    model = byte_model()
    states = {code: mlp_inputs(model, rows_of(code)) for code in TEXTS}
    gram = measured(model, ["similarity"]).grams["similarity"]
    for layer, (i, a), (j, b) in product(range(2), enumerate(TEXTS), enumerate(TEXTS)):
        pairs = nn.functional.cosine_similarity(states[a][layer][:, None], states[b][layer][None], dim=-1)
        assert gram[layer, i, j] == pytest.approx(pairs.mean().item(), abs=1e-6)


def test_representations_are_mean_hidden_states():
    model = byte_model()
    means = []
    for code in TEXTS:
        with torch.no_grad():
            hidden = [model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows_of(code)]
        means.append(torch.cat([row[1][0].double() for row in hidden]).mean(dim=0))  # behind the first layer
    expected = torch.stack(means) @ torch.stack(means).T
    np.testing.assert_allclose(measured(model, ["representations"]).grams["representations"][0], expected, rtol=1e-5)


def test_deviation_is_what_a_plain_loop_changes():
    model, changes = byte_model(), []
    for code in TEXTS:
        tuned = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3, weight_decay=0.0)
        rows = torch.tensor(rows_of(code, 3 * 2 * 24)).view(3, 2, 24)
        for step, ids in enumerate(rows):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
            optimizer.zero_grad()
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        pairs = zip(matrices(tuned), matrices(model), strict=True)
        changes.append([concatenated(new) - concatenated(old) for new, old in pairs])
    statistics = measured(model, ["deviation"])
    for layer in range(2):
        vectors = np.stack([change[layer] for change in changes])
        np.testing.assert_allclose(statistics.grams["deviation"][layer], vectors @ vectors.T, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(statistics.deviation()["hu"][layer], np.linalg.norm(vectors[1]), rtol=1e-5)


def test_gradients_are_those_of_the_mean_loss():
    model, gradients = byte_model(), []
    for code in TEXTS:
        copied, rows = copy.deepcopy(model), rows_of(code)
        targets = sum(len(row) - 1 for row in rows)
        for row in rows:
            ids = torch.tensor([row])
            (copied(input_ids=ids, labels=ids).loss * (len(row) - 1) / targets).backward()
        gradients.append([concatenated(p.grad for p in layer) for layer in matrices(copied)])
    gram = measured(model, ["gradients"]).grams["gradients"]
    for layer in range(2):
        vectors = np.stack([gradient[layer] for gradient in gradients])
        np.testing.assert_allclose(gram[layer], vectors @ vectors.T, rtol=1e-4, atol=1e-9)


def test_batch_size_changes_nothing():
    model = byte_model()
    one, many = (measured(model, batch_size=size) for size in (1, 5))  # the last row is shorter: 5 together are padded
    for source in SOURCES:
        np.testing.assert_allclose(one.grams[source], many.grams[source], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, rows = byte_model(), rows_of("hu")
    plain = batches(rows[:1], 1)[0]
    padding = (9, 0) if side == "left" else (0, 9)
    padded = Batch(*(nn.functional.pad(part, padding) for part in plain))
    for attribute in ("mean_unit_vectors", "mean_hidden_states"):
        before, after = (
            getattr(StateMeans(decoder_blocks(model)).read(model, [batch]), attribute)() for batch in (plain, padded)
        )
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
    gradients = []
    for batch in (plain, padded):
        model.zero_grad()
        add_gradients(model, [batch])
        gradients.append(concatenated(p.grad for p in model.parameters()))
    rounding = 1e-5 * np.abs(gradients[0]).max()  # sums of other lengths are added up in another order
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=rounding)


def test_the_model_is_left_as_it_was():
    model = byte_model().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    measured(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_seed_chooses_the_documents():
    model = byte_model()
    grams = [measured(model, ["similarity"], seed=seed).grams["similarity"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(grams[0], grams[1])
    assert not np.allclose(grams[0], grams[2], atol=1e-4)


def test_norms_are_of_all_layers_and_vectors_of_the_last():
    model = byte_model()
    whole, part = (measured(model, ["deviation"], vector_layers=layers) for layers in (None, 1))
    np.testing.assert_array_equal(whole.deviation()["el"], part.deviation()["el"])
    assert part.between_languages("deviation") == whole.between_languages("deviation", layers=[1])
    again = LanguageStatistics.from_json(part.to_json())
    assert again.between_languages()["en"]["hu"] == pytest.approx(part.between_languages()["en"]["hu"], abs=1e-6)
    with pytest.raises(DataError, match="expected some of \\[1\\]"):
        part.between_languages("deviation", layers=[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(family):
    statistics = measured(byte_model(family), steps=1, step_sequences=1)
    assert statistics.layers == (0, 1)
    assert statistics.model["hidden_size"] == 32
    assert all(np.isfinite(gram).all() and (np.diagonal(gram, 0, 1, 2) > 0).all() for gram in statistics.grams.values())


def test_a_stream_is_read_only_as_far_as_needed():
    read = []

    def stream():
        for index in range(10**9):
            read.append(index)
            yield f"document {index}"

    rows = token_rows(byte_tokenizer(), stream(), "en", tokens=50, sequence_length=20)
    assert [len(row) for row in rows] == [20, 20, 10]
    assert len(read) < 1100


def test_what_cannot_be_measured_is_refused():
    model = byte_model()
    with pytest.raises(DataError, match="two languages or more"):
        measured(model, texts={"en": TEXTS["en"]})
    with pytest.raises(DataError, match="hu: got text of 11 tokens, expected 100 or more"):
        measured(model, texts={"en": TEXTS["en"], "hu": ["nagyon kevés"[:10]]})
    with pytest.raises(DataError, match="sources: got \\['guess'\\]"):
        measured(model, ["guess"])
    with pytest.raises(DataError, match="batch_size: got 0"):
        measured(model, batch_size=0)
    with pytest.raises(DataError, match="steps: got 0"):
        Measurement(steps=0)
    with pytest.raises(ArchitectureError, match="bfloat16, in which a small step is rounded away"):
        measured(byte_model().bfloat16(), ["deviation"])
    with pytest.raises(ArchitectureError, match="carries adapters"):
        measured(upcycle(byte_model()), ["similarity"])
    with pytest.raises(ArchitectureError, match="match 0 modules"):
        measure_languages(model, byte_tokenizer(), TEXTS, target_modules=["attention"])
