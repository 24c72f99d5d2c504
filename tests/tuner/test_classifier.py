"""Routing with a classifier: causal, the same with a cache and in any batch, and learned routing elsewhere."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from builders import EXPERTS, alike, logits, moe_layers, perturbed, pico, token_batch, upcycle
from chance import shifted
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.errors import GraftError, LanguageError, PlanError
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.routing import most_similar_layers

TOKENS = token_batch(4, 9)
IDS = torch.arange(4)


def gated_model(seed=0, layers=(0, 2), **fields):
    """Three layers, gates on two of them that let about half of the tokens through."""
    fields = {"routing": "classifier", "classifier_layers": list(layers), **fields}
    model = upcycle(pico(num_hidden_layers=3), trained=True, **fields)
    return set_gates(model, seed)


def set_gates(model, seed=0):
    generator = torch.Generator().manual_seed(shifted(seed))
    for layer in moe_layers(model):
        for rows in layer.moe_delta_classifier.parameters():
            rows.data.copy_(torch.randn(rows.shape, generator=generator))
    return model


class Classes:
    """Whether each gate took each token of the passes within for an original one, (layer, batch, sequence)."""

    def __init__(self, model):
        self.gates = [layer for layer in moe_layers(model) if layer.classifier("default") is not None]
        self.seen = [[] for _ in self.gates]

    def __enter__(self):
        self.hooks = [
            layer.register_forward_pre_hook(lambda layer, args, i=i: self.seen[i].append(self.of(layer, args[0])))
            for i, layer in enumerate(self.gates)
        ]
        return self

    @staticmethod
    def of(layer, x):
        steps = layer.settings["default"].config.record.open_steps
        return layer.classifier("default").recognises(x.flatten(0, -2), steps).view(x.shape[:-1])

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    @property
    def found(self):
        return torch.stack([torch.cat(parts, dim=1) for parts in self.seen])


def classes_and_logits(model, tokens, **arguments):
    with Classes(model) as classes:
        found = logits(model, tokens, **arguments)
    return classes.found, found


def test_the_gates_of_this_file_send_tokens_both_ways(holds):
    found = torch.stack([classes_and_logits(gated_model(seed), TOKENS)[0] for seed in range(3)])
    holds(found.float().mean(), above=0.05, below=0.95)


# -- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_token_by_token_equals_one_pass(seed):
    model = gated_model(seed)
    classes, expected = classes_and_logits(model, TOKENS)
    cache = DynamicCache(config=model.config)
    with Classes(model) as one_by_one, torch.no_grad():
        parts = [
            model(TOKENS[:, t : t + 1], attention_mask=torch.ones(4, t + 1), past_key_values=cache).logits
            for t in range(TOKENS.shape[1])
        ]
    assert torch.equal(one_by_one.found, classes)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_left_padding_equals_one_pass(seed):
    model = gated_model(seed)
    classes, expected = classes_and_logits(model, TOKENS)
    filler = torch.randint(3, 99, (4, 5))
    mask = torch.cat([torch.zeros_like(filler), torch.ones_like(TOKENS)], dim=1)
    padded_classes, padded = classes_and_logits(
        model, torch.cat([filler, TOKENS], dim=1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )
    assert torch.equal(padded_classes[:, :, 5:], classes)
    torch.testing.assert_close(padded[:, 5:], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_class_never_depends_on_later_tokens_or_other_rows(seed):
    model = gated_model(seed)
    classes, expected = classes_and_logits(model, TOKENS)
    for length in range(1, TOKENS.shape[1]):
        other = torch.cat([TOKENS[:, :length], token_batch(4, 9 - length, seed=length)], dim=1)
        found, _ = classes_and_logits(model, other)
        assert torch.equal(found[:, :, :length], classes[:, :, :length])
    alone, by_itself = classes_and_logits(model, TOKENS[2:3])
    assert torch.equal(alone, classes[:, 2:3])
    torch.testing.assert_close(by_itself, expected[2:3], atol=5e-5, rtol=0)


def test_generation_with_a_cache_equals_recomputing():
    model = gated_model()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(TOKENS)
    cached = model.generate(input_ids=TOKENS, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(input_ids=TOKENS, attention_mask=mask, use_cache=False, **options))


def test_what_a_gate_recognises_runs_on_expert_0_and_the_rest_as_learned():
    model = gated_model()
    seen = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
        for layer in moe_layers(model)
    ]
    logits(model, TOKENS)
    for hook in hooks:
        hook.remove()
    learned = copy.deepcopy(model)
    learned.start_expansion(routing="learned")
    assert len(seen) == 3
    for (layer, x, output), twin in zip(seen, moe_layers(learned), strict=True):
        gate = layer.classifier("default")
        original = Classes.of(layer, x) if gate is not None else torch.zeros(x.shape[:2], dtype=torch.bool)
        with torch.no_grad():
            expected = torch.where(original[..., None], layer.base_layer(x), twin(x))
        torch.testing.assert_close(output, expected, atol=5e-5, rtol=0)


def test_an_untrained_gate_recognises_nobody():
    fields = {"classifier_layers": [0, 1]}
    gated = upcycle(pico(), trained=True, routing="classifier", **fields)
    assert torch.equal(logits(gated, TOKENS), logits(upcycle(pico(), trained=True, **fields), TOKENS))


# -- training ---------------------------------------------------------------------------------------------------------


def trainable(model, part):
    return [name for name, p in model.named_parameters() if part in name and p.requires_grad]


def test_gates_train_in_review_under_their_own_routing_alone():
    model = gated_model()
    assert not trainable(model, "classifier")
    model.start_review()
    assert len(trainable(model, "moe_delta_classifier")) == 2
    assert len(trainable(model, "moe_delta_router")) == 3
    assert not trainable(model, "moe_delta_experts")
    model.start_review(routing="learned")
    assert not trainable(model, "classifier")
    model.start_review(routing="classifier", classifier_coef=0.0)
    assert not trainable(model, "classifier")


def test_the_classifier_loss_reaches_the_model_loss_and_the_log():
    model = gated_model()
    model.start_review(language_prior_coef=0.0)
    batch = {"input_ids": TOKENS, "labels": TOKENS, "language_ids": IDS}
    model.train()
    with_gates = model(**batch).loss
    layers = [layer for layer in moe_layers(model) if layer.classifier("default") is not None]
    recorded = layers[0].context.read_statistics()["classifier_loss"]
    model.start_review(language_prior_coef=0.0, classifier_coef=0.0)
    without = model(**batch).loss
    # The mean over the layers with a gate, two of three, and not thinned out by the one without.
    torch.testing.assert_close(with_gates - without, torch.tensor(0.1 * recorded), atol=5e-5, rtol=0)


def test_a_review_teaches_gates_to_tell_separable_languages_apart(holds):
    """Four languages of tokens of their own; Hungarian, of id 0, is no original language, English, of id 1, is."""
    base = alike(pico(num_hidden_layers=3), *(range(3 + 4 * i, 7 + 4 * i) for i in range(len(IDS))))
    model = upcycle(base, trained=True, routing="classifier", classifier_layers=[0, 2])
    generator = torch.Generator().manual_seed(shifted(0))
    model.start_review()
    draw = lambda ids: 3 + 4 * ids[:, None] + torch.randint(4, (len(ids), 12), generator=generator)  # noqa: E731
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        tokens = draw(IDS)
        optimizer.zero_grad()
        model.train()(input_ids=tokens, labels=tokens, language_ids=IDS).loss.backward()
        optimizer.step()
    ids = IDS.repeat(8)
    found, _ = classes_and_logits(model.eval(), draw(ids))
    holds(found[:, ids == 1].float().mean(), above=0.95, name="English")
    holds(found[:, ids != 1].float().mean(), below=0.05, name="the others")


def test_a_training_pass_without_languages_is_refused():
    model = gated_model()
    model.start_review(language_prior_coef=0.0)
    with pytest.raises(LanguageError, match="classifiers' loss"):
        model.train()(input_ids=TOKENS, labels=TOKENS)


# -- with everything else ---------------------------------------------------------------------------------------------


def test_gates_are_saved_and_loaded(tmp_path):
    model = gated_model()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico(num_hidden_layers=3), tmp_path)
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))


def test_gates_are_grafted_and_no_stock_architecture_has_them():
    base = pico(num_hidden_layers=3)
    model = gated_model()
    grafted = model.graft(perturbed(base))
    for ours, theirs in zip(moe_layers(model), moe_layers(grafted), strict=True):
        if (gate := ours.classifier("default")) is not None:
            assert torch.equal(gate.weight, theirs.classifier("default").weight)
    with pytest.raises(GraftError, match="no gate before them.*classifier.*remote_code=True.*graft"):
        to_stock(model)
    model.start_review(routing="learned")
    to_stock(model)


@pytest.mark.parametrize("experts", [EXPERTS, {"uralic": [2, 0, 1], "turkic": [1, 0, 1]}], ids=["even", "uneven"])
def test_growing_leaves_gates_as_they_were_until_review_and_after_removal(experts):
    model = gated_model(layers=(0, 1, 2), experts=experts)
    model.start_review()
    expected, known = logits(model, TOKENS), logits(model, TOKENS, language_ids=IDS)
    trained = set(trainable(model, ""))
    model.add_languages({"bn": "indic"}, {"indic": 1})
    assert torch.equal(logits(model, TOKENS), expected)
    assert torch.equal(logits(model, TOKENS, language_ids=IDS), known)
    model.start_review()
    gates = trainable(model, "classifier")
    assert len(gates) == 3 and all(name.endswith("grown_1") for name in gates)
    set_gates(model, 1)
    model.remove_group("indic")
    assert set(trainable(model, "")) == trained
    restored = set_gates(model)  # the gates of the first step were drawn from the same seed
    assert torch.equal(logits(restored, TOKENS), expected)


def test_a_language_under_way_passes_closed_gates():
    model = gated_model(layers=(0, 1, 2))
    for layer in moe_layers(model):
        layer.classifier("default").recognise_all()
    english = logits(model, TOKENS)
    assert torch.equal(english, logits(pico(num_hidden_layers=3), TOKENS))
    model.add_languages({"bn": "indic"}, {"indic": 1})
    assert torch.equal(logits(model, TOKENS, language="en"), english)
    assert not torch.equal(logits(model, TOKENS, language="bn"), english)


# -- which layers, and bad input --------------------------------------------------------------------------------------


def test_most_similar_layers_by_hand():
    similarity = [0.1, 0.5, 0.3, 0.5, 0.2]
    assert most_similar_layers(similarity, count=2) == [1, 3]
    assert most_similar_layers(similarity, count=3) == [1, 2, 3]
    assert most_similar_layers(similarity, threshold=0.3) == [1, 2, 3]
    assert most_similar_layers([0.5, 0.5, 0.5], count=2) == [0, 1], "the first of equals"


@pytest.mark.parametrize("options", [{}, {"count": 1, "threshold": 0.1}, {"count": 0}, {"count": 4}, {"threshold": 1}])
def test_a_choice_of_no_layers_is_refused(options):
    with pytest.raises(PlanError, match="count"):
        most_similar_layers([0.1, 0.2, 0.3], **options)


def test_classifiers_need_layers_that_are_there():
    with pytest.raises(PlanError, match="needs `classifier_layers`"):
        MoeDeltaConfig(languages={"hu": "uralic"}, experts={"uralic": 1}, routing="classifier")
    with pytest.raises(PlanError, match=r"names \[7\], which are not among the transformed layers \[0, 1\]"):
        upcycle(pico(), routing="classifier", classifier_layers=[0, 7])
    model = upcycle(pico(), trained=True)
    with pytest.raises(PlanError, match="needs `classifier_layers`"):
        model.start_review(routing="classifier")
    assert model.active_peft_config.routing == "learned"
