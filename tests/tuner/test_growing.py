"""Growing: what the earlier languages compute stays bit for bit, and every road holds for an adapter that has grown."""

import copy

import pytest
import torch
from peft import PeftModel

from builders import LANGUAGES, logits, moe_layers, perturbed, pico, token_batch, upcycle
from peft_moe_delta import MoeDeltaConfig
from peft_moe_delta.errors import GraftError, LanguageError, PlanError
from peft_moe_delta.graft.memory import to_stock
from peft_moe_delta.routing import within_reach

TOKENS = token_batch(4, 7)
EARLIER = torch.arange(len(LANGUAGES))
ROUTINGS = pytest.mark.parametrize("routing", ["learned", "language"])
INSERTIONS = (("bn", "indic", 2), ("sw", "bantu", 1), ("ko", "koreanic", [1, 0, 2]))
UNEVEN = {"uralic": [2, 0, 1], "turkic": [1, 0, 1]}  # the middle layer is dense until Bengali comes


def trained_model(**fields):
    return upcycle(pico(num_hidden_layers=3), trained=True, **fields)


def train(model, code, steps=2):
    """A few steps in which everything that may move does, momentum and weight decay included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids = torch.full((4,), model.active_peft_config.language_table.id_of(code))
    for step in range(steps):
        optimizer.zero_grad()
        # A review sees every language, an expansion the new one.
        seen = ids if model.active_peft_config.record.stage == "expansion" else torch.arange(4) + step
        model.train()(input_ids=TOKENS, labels=TOKENS, language_ids=seen).loss.backward()
        optimizer.step()
    assert not {p for p in model.parameters() if not p.requires_grad} & set(optimizer.state)
    model.eval()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def in_every_language(model, codes=LANGUAGES):
    return {code: logits(model, TOKENS, language=code) for code in codes}


# -- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
@pytest.mark.parametrize("experts", [None, UNEVEN], ids=["even", "uneven"])
def test_three_insertions_leave_earlier_languages_bit_equal_under_language_routing(experts, rank):
    model = trained_model(routing="language", expert_rank=rank, **({"experts": experts} if experts else {}))
    expected, mixed = in_every_language(model), logits(model, TOKENS, language_ids=EARLIER)
    for code, group, count in INSERTIONS:
        model.add_languages({code: group}, {group: count})
        assert_same(in_every_language(model, expected), expected)
        train(model, code)
        model.start_review()
        train(model, code)
        assert_same(in_every_language(model, expected), expected)
        assert torch.equal(logits(model, TOKENS, language_ids=EARLIER), mixed)
        own = logits(model, TOKENS, language=code)
        assert all((own - other).abs().max() > 0.01 for other in expected.values()), "the new language did learn"
        expected[code] = own


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [None, UNEVEN], ids=["even", "uneven"])
def test_insertions_leave_a_learned_mixture_bit_equal_until_review(experts, top_k):
    model = trained_model(routing="learned", top_k=top_k, **({"experts": experts} if experts else {}))
    unknown, known = logits(model, TOKENS), logits(model, TOKENS, language_ids=EARLIER)
    for code, group, count in INSERTIONS:
        model.add_languages({code: group}, {group: count})
        for _ in range(2):
            assert torch.equal(logits(model, TOKENS), unknown)
            assert torch.equal(logits(model, TOKENS, language_ids=EARLIER), known)
            train(model, code)  # in expansion: the new experts are out of reach for everybody else
        model.start_review()
        assert not torch.equal(logits(model, TOKENS), unknown), "open from here"
        unknown, known = logits(model, TOKENS), logits(model, TOKENS, language_ids=EARLIER)


@ROUTINGS
@pytest.mark.parametrize("experts", [None, UNEVEN], ids=["even", "uneven"])
def test_removing_groups_gives_back_the_model_before_each(experts, routing):
    model = trained_model(routing=routing, **({"experts": experts} if experts else {}))
    model.start_review(language_prior_coef=0.3)
    before = []
    for code, group, count in INSERTIONS:
        config = copy.deepcopy(model.active_peft_config)
        before.append((group, config, state_of(model), logits(model, TOKENS, language_ids=EARLIER), requires(model)))
        model.add_languages({code: group}, {group: count})
        train(model, code)
        model.start_review(routing="learned")
        train(model, code)
    for group, config, state, expected, trainable in reversed(before):
        model.remove_group(group)
        assert model.active_peft_config == config
        assert_same(model.state_dict(), state)
        assert torch.equal(logits(model, TOKENS, language_ids=EARLIER), expected)
        assert requires(model) == trainable


def requires(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_what_was_added_last_trains():
    model = trained_model()
    model.add_languages({"bn": "indic"}, {"indic": 2})
    layers = [f"base_model.model.model.layers.{i}.mlp" for i in range(3)]
    rows = {f"{layer}.moe_delta_router.default.grown_3" for layer in layers}
    own = {name for name in requires(model) if ".moe_delta_experts.default.3." in name or ".default.4." in name}
    assert requires(model) == rows | own
    assert len(own) == 3 * 2 * 3, "three matrices of two experts in three layers"
    model.start_review()
    assert requires(model) == rows
    model.start_review(train_earlier_rows=True)
    assert requires(model) == rows | {f"{layer}.moe_delta_router.default.weight" for layer in layers}
    model.add_languages({"sw": "bantu"}, {"bantu": 1})
    assert {name.split(".default.")[1].split(".")[0] for name in requires(model)} == {"5", "grown_4"}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert {name.split(".default.")[1].split(".")[0] for name in requires(model)} == {"5", "grown_4"}


def test_the_review_keeps_earlier_groups_on_expert_0_and_their_own():
    model = trained_model()
    model.add_languages({"bn": "indic"}, {"indic": 1})
    model.start_review()
    settings = moe_layers(model)[0].settings["default"]
    assert settings.config.prior_groups == ("original", "uralic", "turkic")
    assert settings.tables.prior_targets == (
        (True, False, False, False, False),
        (True, True, True, False, False),  # expert 0 and the group's own
        (True, False, False, True, False),
        (False,) * 5,  # the new group is free to choose
    )
    model.start_review(language_prior_groups=["original", "indic"])
    assert settings.tables.prior_targets[1] == (False,) * 5
    assert settings.tables.prior_targets[3] == (False, False, False, False, True)


def test_reach_by_hand():
    everything = ((True,) * 4,) * 4
    # Group 1 was there from the start, 2 and 3 came in two steps; one expert each, but none of group 0 beyond expert 0.
    assert within_reach(everything, (1, 1, 1, 1), (0, 0, 1, 2), 0) == (
        (True, True, False, False),
        (True, True, False, False),
        (True, True, True, False),
        (True, True, True, True),
    )
    assert within_reach(everything, (1, 1, 1, 1), (0, 0, 1, 2), 1)[0] == (True, True, True, False)
    assert within_reach(everything, (1, 1, 1, 1), (0, 0, 1, 2), 2) == everything


# -- where new experts start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
def test_new_experts_start_as_expert_0_or_as_another_groups(rank):
    model = trained_model(routing="language", expert_rank=rank)
    hungarian = logits(model, TOKENS, language="hu")
    azeri = logits(model, TOKENS, language="az")
    model.add_languages({"bn": "indic", "ky": "kipchak"}, {"indic": 1, "kipchak": 2}, start_from={"kipchak": "turkic"})
    assert torch.equal(logits(model, TOKENS, language="bn"), logits(model, TOKENS, language="en"))
    torch.testing.assert_close(logits(model, TOKENS, language="ky"), azeri, atol=5e-5, rtol=0)
    model.add_languages({"et": "estonian"}, {"estonian": 2}, start_from="uralic")
    for layer in moe_layers(model):
        for copied, source in zip(layer.experts("default")[-2:], layer.experts("default")[1:3], strict=True):
            assert_same(copied.state_dict(), source.state_dict())
    assert not torch.equal(hungarian, azeri)


def test_languages_join_a_group_that_exists():
    model = trained_model(routing="language")
    before, trainable = state_of(model), requires(model)
    model.add_languages({"et": "uralic", "de": "original"})
    assert_same(model.state_dict(), before)
    assert requires(model) == trainable
    assert model.active_peft_config.record.growth == ()
    assert torch.equal(logits(model, TOKENS, language="et"), logits(model, TOKENS, language="hu"))
    assert torch.equal(logits(model, TOKENS, language="de"), logits(model, TOKENS, language="en"))
    assert model.active_peft_config.record.language_ids == (*LANGUAGES, "et", "de")
    model.add_languages({"bn": "indic", "kk": "turkic"}, {"indic": 1})
    model.remove_group("indic")
    assert model.active_peft_config.record.language_ids == (*LANGUAGES, "et", "de", "kk"), "who joined stays"


# -- saving, loading, grafting, exporting -----------------------------------------------------------------------------


@ROUTINGS
def test_adapters_saved_before_and_after_growth_load(routing, tmp_path):
    model = trained_model(routing=routing, experts=UNEVEN)
    model.save_pretrained(tmp_path / "before")
    before = logits(model, TOKENS, language_ids=EARLIER)
    model.add_languages({"bn": "indic"}, {"indic": [0, 2, 1]})
    train(model, "bn")
    model.save_pretrained(tmp_path / "after")
    after = logits(model, TOKENS, language="bn")
    base = pico(num_hidden_layers=3)
    old = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "before", is_trainable=True).eval()
    assert torch.equal(logits(old, TOKENS, language_ids=EARLIER), before)
    new = PeftModel.from_pretrained(base, tmp_path / "after", is_trainable=True).eval()
    assert torch.equal(logits(new, TOKENS, language="bn"), after)
    assert torch.equal(logits(new, TOKENS, language_ids=EARLIER), before)
    assert requires(new) == requires(model)
    assert new.plan() == model.plan()
    new.load_adapter(tmp_path / "before", "old")
    new.set_adapter("old")
    assert torch.equal(logits(new, TOKENS, language_ids=EARLIER), before)
    new.set_adapter("default")
    new.remove_group("indic")
    assert torch.equal(logits(new, TOKENS, language_ids=EARLIER), before)
    old.add_languages({"bn": "indic"}, {"indic": 1})
    assert torch.equal(logits(old, TOKENS, language_ids=EARLIER), before)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "low-rank"])
@ROUTINGS
def test_a_grown_adapter_grafts(routing, rank):
    base = pico()
    post = perturbed(base)
    model = upcycle(copy.deepcopy(base), trained=True, routing=routing, expert_rank=rank)
    model.add_languages({"bn": "indic"}, {"indic": 2})
    untrained = model.graft(copy.deepcopy(post))
    english = logits(untrained, TOKENS, language="en")
    assert untrained.plan() == model.plan()
    train(model, "bn")
    grafted = model.graft(post)
    assert torch.equal(logits(grafted, TOKENS, language="en"), english)
    for ours, theirs in zip(moe_layers(model), moe_layers(grafted), strict=True):
        assert torch.equal(ours.router("default").rows, theirs.router("default").rows)
    assert not torch.equal(logits(grafted, TOKENS, language="bn"), english)


def test_a_grown_adapter_exports_once_its_experts_are_open():
    model = upcycle(pico(), trained=True)
    model.add_languages({"bn": "indic"}, {"indic": 2})
    train(model, "bn")
    with pytest.raises(GraftError, match="indic.*start_review"):
        to_stock(model)
    model.start_review()
    torch.testing.assert_close(logits(to_stock(model), TOKENS), logits(model, TOKENS), atol=1e-4, rtol=0)


def test_a_grown_language_exports_as_a_dense_model():
    model = upcycle(pico(), trained=True, routing="language")
    model.add_languages({"bn": "indic"}, {"indic": 1})
    train(model, "bn")
    exported = to_stock(model, language="bn")
    torch.testing.assert_close(logits(exported, TOKENS), logits(model, TOKENS, language="bn"), atol=1e-4, rtol=0)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("languages", "experts", "options", "error", "message"),
    [
        ({"hu": "indic"}, {"indic": 1}, {}, LanguageError, "knows hu already"),
        ({"bn": "uralic"}, {"uralic": 1}, {}, PlanError, "uralic, which the adapter has already"),
        ({"bn": "original"}, {"original": 1}, {}, PlanError, "original, which the adapter has already"),
        ({"bn": "indic"}, {}, {}, PlanError, r"brings the new groups \['indic'\]"),
        ({"bn": "indic"}, {"indic": 1, "bantu": 1}, {}, PlanError, "Give every"),
        ({}, {}, {}, LanguageError, "at least one language"),
        ({"bn": "indic"}, {"indic": 0}, {}, PlanError, "no expert in any layer"),
        ({"bn": "indic"}, {"indic": [1, 1]}, {}, PlanError, "lists 2 counts, but the model has 3"),
        ({"bn": "indic"}, {"indic": 1}, {"start_from": "slavic"}, PlanError, "start_from='slavic' must name one of"),
        ({"bn": "indic"}, {"indic": 1}, {"start_from": {"bantu": "uralic"}}, PlanError, "start_from"),
    ],
)
def test_bad_growth_is_refused_and_changes_nothing(languages, experts, options, error, message):
    model = trained_model()
    before, config = state_of(model), copy.deepcopy(model.active_peft_config)
    with pytest.raises(error, match=message):
        model.add_languages(languages, experts, **options)
    assert_same(model.state_dict(), before)
    assert model.active_peft_config == config


def test_an_adapter_that_trains_shared_modules_does_not_grow():
    model = upcycle(pico(), modules_to_save=["lm_head"])
    with pytest.raises(PlanError, match="lm_head.*modules_to_save"):
        model.add_languages({"bn": "indic"}, {"indic": 1})
    model.add_languages({"et": "uralic"})


def test_only_the_last_group_is_removed():
    model = trained_model()
    with pytest.raises(PlanError, match="none was added"):
        model.remove_group("uralic")
    model.add_languages({"bn": "indic", "sw": "bantu"}, {"indic": 1, "bantu": 1})
    with pytest.raises(PlanError, match="added last can be removed: bantu; got 'indic'"):
        model.remove_group("indic")
    model.add_languages({"et": "uralic"})
    with pytest.raises(LanguageError, match="came after those of 'bantu'"):
        model.remove_group("bantu")


def test_the_default_language_goes_with_its_group():
    model = trained_model(routing="language")
    model.add_languages({"bn": "indic"}, {"indic": 1})
    model.set_language("bn")
    model.remove_group("indic")
    with pytest.raises(LanguageError, match="needs the language"):
        logits(model, TOKENS)


def test_growth_is_saved_in_the_config():
    model = trained_model()
    model.add_languages({"bn": "indic"}, {"indic": 1})
    config = MoeDeltaConfig(**{k: v for k, v in model.active_peft_config.to_dict().items() if k != "peft_type"})
    assert config.steps == (0, 0, 0, 1)
