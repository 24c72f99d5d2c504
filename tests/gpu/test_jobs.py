"""What a user does with a model on a card: save, load, generate, fit, calibrate, grow, evaluate, graft, export."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from builders import logits, perturbed, pico, token_batch, upcycle
from gpu.conftest import assert_near, on
from peft_moe_delta import fit_identifier, fit_routers
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.identifier import recognised_languages
from peft_moe_delta.mixing.statistics import RouterStatistics
from reading import MEMORY, mixed, reader, texts
from test_calibration import TEXTS, calibrate, planted
from training.common import make_tokenizer

ROUTINGS = {"learned": {}, "language": {"language": "hu"}, "context": {}}


def model_of(routing):
    return reader() if routing == "context" else upcycle(pico(), trained=True, routing=routing)


def generate(model, tokens, **options):
    found = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, eos_token_id=None,
        **options,
    )  # fmt: skip
    return found.cpu()


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_generation_with_a_cache(routing, device):
    model, tokens = model_of(routing), mixed()[:, :20]
    there = on(model, device)
    expected = generate(model, tokens, **ROUTINGS[routing])
    assert torch.equal(generate(there, tokens.to(device), **ROUTINGS[routing]), expected)
    assert torch.equal(generate(there, tokens.to(device), use_cache=False, **ROUTINGS[routing]), expected)


def test_a_prompt_of_embeddings_and_a_cache_of_read_tokens(device):
    model, ids = on(reader(), device), mixed().to(device)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[:, :20])
        cache = model(inputs_embeds=embedded, language="hu", use_cache=True).past_key_values
        assert model(input_ids=ids[:, 20:], past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_saved_there_and_loaded_anywhere(routing, device, folder):
    model = model_of(routing)
    on(model, device).save_pretrained(folder)
    expected = logits(model, token_batch(), **ROUTINGS[routing])
    on_cpu, there = PeftModel.from_pretrained(pico(), folder), PeftModel.from_pretrained(pico().to(device), folder)
    assert torch.equal(logits(on_cpu.eval(), token_batch(), **ROUTINGS[routing]), expected)
    assert_near(logits(there.eval(), token_batch().to(device), **ROUTINGS[routing]), expected)


def test_an_identifier_is_fitted(device):
    model = upcycle(pico(), trained=True, routing="context")
    there = on(model, device)
    for each in (model, there):
        fit_identifier(each, texts(), make_tokenizer(), memory=MEMORY)
    assert recognised_languages(there, mixed().to(device)) == recognised_languages(model, mixed())


def test_routers_are_fitted_beside_statistics_from_a_file(device, folder):
    model = upcycle(pico(), trained=True)
    there, documents = on(model, device), texts(documents=4)
    early = {code: documents[code] for code in ("hu", "en", "az")}
    for each, name in ((model, "here"), (there, "there")):
        fit_routers(each, early, make_tokenizer()).save(folder / name)
        fit_routers(each, {"fi": documents["fi"]}, make_tokenizer(), statistics=RouterStatistics.load(folder / name))
    assert_near(logits(there, token_batch().to(device)), logits(model, token_batch()))


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_routers_are_calibrated(device):
    there = on(planted(), device)
    found = calibrate(there)
    assert {row.language for row in found.after} == set(TEXTS)
    assert min(row.right for row in found.after) > min(row.right for row in found.before)


def test_a_language_is_added_and_taken_away(device):
    there = on(upcycle(pico(), trained=True), device)
    before = logits(there, token_batch().to(device), language="hu")
    there.add_languages({"bn": "indic"}, experts={"indic": 1})
    assert logits(there, token_batch().to(device), language="bn").isfinite().all()
    there.remove_group("indic")
    assert torch.equal(logits(there, token_batch().to(device), language="hu"), before)


def test_text_is_scored(device):
    model, documents = upcycle(pico(), trained=True), texts(("hu",), documents=3)["hu"]
    scores = [bits_per_byte(m, make_tokenizer(), documents, language="hu").value for m in (model, on(model, device))]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graft_and_its_export(family, dtype, device):
    model, post_trained = upcycle(pico(family), trained=True), perturbed(pico(family), scale=0.05)
    there, theirs = on(model, device, dtype), on(post_trained, torch.device("cpu"), dtype)
    expected = logits(model.graft(post_trained), token_batch())
    exported = there.merge_and_graft(theirs)
    assert {p.device.type for p in exported.parameters()} == {device.type}
    assert_near(logits(exported, token_batch().to(device)), expected, dtype)


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_remote_code_by_language(device):
    model = upcycle(pico(), trained=True, routing="language")
    there = on(model, device)
    expected = logits(model.graft(perturbed(pico(), scale=0.05)), token_batch(), language="hu")
    exported = there.merge_and_graft(perturbed(pico(), scale=0.05), remote_code=True)
    assert_near(logits(exported, token_batch().to(device), language="hu"), expected)
