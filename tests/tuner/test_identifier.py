"""Routing by context in a model: languages read from text, wherever a model runs, is saved, grows or is cached."""

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from builders import LANGUAGES, moe_layers, pico, upcycle
from chance import shifted
from peft_moe_delta import fit_identifier
from peft_moe_delta.errors import DataError, LanguageError
from peft_moe_delta.identifier import recognised_languages
from peft_moe_delta.tuner.identifier import Identifiers
from reading import MEMORY, WORDS, mixed, reader, text_of, texts
from training.common import make_tokenizer


def ids_of(model, ids):
    """Language ids as the identifier reads them; English where it reads none."""
    codes = list(LANGUAGES)
    read = recognised_languages(model, ids)
    return torch.tensor([[codes.index(code or "en") for code in row] for row in read])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom"])
def test_what_is_read_computes_what_is_told(family):
    """Bit for bit: reading only finds the languages; the rest is routing by language."""
    model, ids = reader(family), mixed()
    read = ids_of(model, ids)
    assert len(set(read.flatten().tolist())) == 4
    with torch.no_grad():
        by_context = model(ids).logits
        told = model(ids, language_ids=read).logits
    assert torch.equal(by_context, told)


def test_the_languages_of_a_text_are_read():
    found = recognised_languages(reader(), mixed())
    for row, order in zip(found, (("en", "hu", "az"), ("fi", "en", "hu"), ("az", "fi", "en")), strict=True):
        for part, code in enumerate(order):
            settled = row[part * 12 + MEMORY : part * 12 + 12]
            assert settled == [None if code == "en" else code] * len(settled)


def test_original_text_runs_on_the_base_model_bit_for_bit():
    model = reader()
    ids = torch.stack([text_of("en", 40, torch.Generator().manual_seed(shifted(7))) for _ in range(2)])
    assert recognised_languages(model, ids) == [[None] * 40] * 2
    with torch.no_grad():
        ours = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, ours)


@pytest.mark.parametrize("chunks", [[1] * 36, [20, 1, 1, 14], [35, 1]])
def test_in_parts_is_in_one_pass(chunks):
    model, ids = reader(), mixed()
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = DynamicCache(), []
        for part in ids.split(chunks, dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_a_cache_that_the_model_made_goes_on():
    model, ids = reader(), mixed()
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :30], use_cache=True)
        second = model(ids[:, 30:], past_key_values=first.past_key_values)
        pair = model(ids[:, :30], use_cache=True, return_dict=False)
        third = model(ids[:, 30:], past_key_values=pair[1])
    torch.testing.assert_close(second.logits, whole[:, 30:], atol=1e-5, rtol=0)
    assert torch.equal(second.logits, third.logits)


def test_left_padding_changes_nothing():
    model, ids = reader(), mixed()
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(41) >= 5).expand(3, 41).long()
    with torch.no_grad():
        whole = model(ids).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(left, whole, atol=1e-5, rtol=0)


def test_packed_documents_are_read_each_from_its_beginning():
    model, ids = reader(), mixed()
    packed, positions = ids.reshape(1, -1), torch.arange(36).repeat(3)[None]
    with torch.no_grad():
        whole = model(ids).logits.reshape(1, 108, -1)
        torch.testing.assert_close(model(packed, position_ids=positions).logits, whole, atol=1e-5, rtol=0)


GREEDY = {
    "greedy": {},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "assistant": {"assistant_model": None},
}


@pytest.mark.parametrize("how", GREEDY)
def test_what_is_generated_greedily_is_what_one_pass_finds_most_likely(how):
    """Tokens are proposed, cropped and cached, and still every one is the best of a pass over all before it."""
    model, ids = reader(), mixed(1 if how in ("lookup", "assistant") else 3)
    options = dict(GREEDY[how])
    if "assistant_model" in options:
        options["assistant_model"] = pico(seed=3)
    found = model.generate(input_ids=ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, **options)
    with torch.no_grad():
        logits = model(found[:, :-1]).logits[:, 35:]
    logits[..., 2] = -torch.inf  # end of text, which min_new_tokens forbids
    chosen = logits.gather(-1, found[:, 36:, None])[..., 0]
    if len(ids) > 1:  # or else one row may stay in one language
        assert len({code for row in recognised_languages(model, found) for code in row[36:]}) > 1
    torch.testing.assert_close(chosen, logits.amax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_are_those_without_a_cache(how):
    model, ids = reader(), mixed()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(shifted())
        found.append(model.generate(input_ids=ids, max_new_tokens=12, min_new_tokens=12, use_cache=use_cache, **how))
    assert torch.equal(*found)


def test_a_named_language_is_not_read_and_auto_reads():
    model, ids = reader(), mixed()
    with torch.no_grad():
        read = model(ids).logits
        told = model(ids, language="hu").logits
        assert not torch.equal(read, told)
        model.base_model.set_language("hu")
        assert torch.equal(model(ids).logits, told)
        assert torch.equal(model(ids, language="auto").logits, read)
        model.base_model.set_language(None)
        by_language = reader(routing="language")
        assert torch.equal(by_language(ids, language="auto").logits, read)
        with pytest.raises(LanguageError, match="fit_identifier"):
            by_language(ids)


def test_saved_and_loaded(tmp_path):
    model, ids = reader(), mixed()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico(), tmp_path)
    lazily = PeftModel.from_pretrained(pico(), tmp_path, low_cpu_mem_usage=True)
    with torch.no_grad():
        for loaded in (again, lazily, again.to(torch.float32)):
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = pico()
    base.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(base(ids).logits, model(ids).logits)


def test_adapters_have_their_own():
    model, ids = reader(), mixed()
    with torch.no_grad():
        first = model(ids).logits
    model.add_adapter("other", reader(fitted=False).peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(LanguageError, match="fit_identifier"):
        model(ids)
    fit_identifier(model, texts(), make_tokenizer(), memory=3)
    model.set_adapter("default")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, first)
    model.delete_adapter("other")
    assert list(Identifiers.of(model.get_base_model())) == ["default"]
    bare = model.unload()
    assert Identifiers.of(bare) is None and not any("moe_delta" in name for name, _ in bare.named_modules())


def test_a_language_joins_and_leaves():
    """The others' counts stay as they are, and so does what they compute where nothing is taken for the new one."""
    codes = {code: group for code, group in LANGUAGES.items() if code != "az"}
    model = upcycle(pico(), trained=True, routing="context", languages=codes, experts={"uralic": 2})
    fit_identifier(model, texts(("en", "hu", "fi")), make_tokenizer(), memory=MEMORY)
    counts = {c: row.clone() for c, row in Identifiers.counts_of(model.get_base_model(), "default").items()}
    ids = mixed()
    with torch.no_grad():
        before = model(ids).logits
    model.base_model.add_languages({"az": "turkic"}, {"turkic": 1})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(LanguageError, match="az"):
        fit_identifier(model, texts(("hu",)), make_tokenizer())
    assert (
        fit_identifier(model, texts(("az",)), make_tokenizer()).memory == MEMORY
    )  # the others' text is read as before
    grown = Identifiers.counts_of(model.get_base_model(), "default")
    assert list(grown) == ["en", "hu", "fi", "az"] and all(torch.equal(grown[c], counts[c]) for c in counts)
    assert "az" in recognised_languages(model, ids)[0]
    model.base_model.remove_group("turkic")
    assert list(Identifiers.counts_of(model.get_base_model(), "default")) == ["en", "hu", "fi"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_what_the_fit_reports(holds):
    model = reader(fitted=False)
    report = fit_identifier(model, texts(documents=60), make_tokenizer())
    assert set(report.recognised) == set(WORDS) and set(report.errors) == {32, 64, 128}
    assert report.memory == min(report.errors, key=report.errors.get)
    assert model.peft_config["default"].record.identifier.memory == report.memory
    holds(min(report.recognised.values()), above=0.8, name="recognised")
    few = fit_identifier(
        model, {code: [" ".join(f"w{i}" for i in range(3, 99))] * 10 for code in WORDS}, make_tokenizer()
    )
    assert any("'hu'" in doubt and "held-out" in doubt for doubt in few.doubts)
    assert set(few.doubts) <= set(model.peft_config["default"].record.doubts)


def test_what_is_refused():
    model, tokenizer = reader(fitted=False), make_tokenizer()
    ids = mixed()
    with pytest.raises(LanguageError, match="fit_identifier"):
        model(ids)
    with pytest.raises(LanguageError, match="fit_identifier"):
        recognised_languages(model, ids)
    with pytest.raises(LanguageError, match="'xx'"):
        fit_identifier(model, {**texts(), "xx": ["w3"]}, tokenizer)
    with pytest.raises(LanguageError, match="hu"):
        fit_identifier(model, texts(("en", "fi", "az")), tokenizer)
    with pytest.raises(LanguageError, match="at least one"):
        fit_identifier(model, texts(("hu", "fi", "az")), tokenizer)
    with pytest.raises(DataError, match="'hu'"):
        fit_identifier(model, {**texts(), "hu": []}, tokenizer)
    with pytest.raises(DataError, match="memory"):
        fit_identifier(model, texts(), tokenizer, memory=0)
    fit_identifier(model, texts(), tokenizer)
    with pytest.raises(LanguageError, match="inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    model(inputs_embeds=model.get_input_embeddings()(ids), language="hu")


def test_training_names_languages_or_has_them_read(tmp_path):
    model = reader().train()
    ids = mixed()
    read = ids_of(model, ids)
    for named in ({}, {"language_ids": read}):
        model.zero_grad()
        model(ids, labels=ids, **named).loss.backward()
        found = [p.grad.clone() for layer in moe_layers(model) for p in layer.moe_delta_experts.parameters()]
        if not named:
            expected = found
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(grad.abs().sum() > 0 for grad in found)
