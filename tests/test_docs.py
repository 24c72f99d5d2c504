"""README and docs: their Python runs as it stands, but for names and numbers of steps; pages and links are current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import greek
import peft_moe_delta
from builders import logits, perturbed, pico, token_batch, upcycle
from peft_moe_delta.recipe import read_recipe
from reading import texts
from training.common import make_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: str, kind: str = "python") -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_a_test_below_runs_every_snippet():
    found = {str(page.relative_to(ROOT)): len(snippets(page)) for page in PAGES if snippets(page)}
    run = [
        "README.md",
        *(f"docs/{page}.md" for page in ("concepts", "growing", "mixing", "new-tokens", "quickstart", "training")),
    ]
    assert found == dict.fromkeys(run, 1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_heading_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.is_file(), target
        titles = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_readme_is_read_in_five_minutes():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_pages_made_from_the_code_are_current():
    made = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_the_recipe_of_the_quickstart_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text(snippets("docs/quickstart.md", "yaml")[0], encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml").expanded_languages == ["hu"]
    changes = re.findall(r"--set (\S+)", (ROOT / "docs/quickstart.md").read_text(encoding="utf-8"))
    tried = read_recipe(tmp_path / "recipe.yaml", changes=changes)
    assert (tried.output, tried.expand.steps, tried.limits.test_documents) == ("try", 6, 8)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_snippets_of_readme_and_quickstart_run(tmp_path):
    [snippet] = snippets("README.md")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *pre_tokenizers.ByteLevel.alphabet()])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    base = pico("qwen3", vocab_size=len(vocabulary))
    for name, model in (("base", base), ("post", perturbed(base))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for written, here in {
        '"Qwen/Qwen3-0.6B-Base"': f'"{tmp_path / "base"}"',
        '"Qwen/Qwen3-0.6B"': f'"{tmp_path / "post"}"',
        'TrainingArguments("out", max_steps=1000)': f'TrainingArguments("{tmp_path}/out", max_steps=2, report_to=[])',
        '"my-adapter"': f'"{tmp_path / "adapter"}"',
        'push_to_hub("me/qwen3-hu-el")': f'save_pretrained("{tmp_path / "chat"}")',
    }.items():
        assert written in snippet
        snippet = snippet.replace(written, here)
    new_text = [{"text": "szia világ", "language": "hu"}, {"text": "γεια σου κόσμε", "language": "el"}] * 8
    review_text = [
        *new_text,
        *[{"text": "hello world", "language": "en"}, {"text": "hola mundo", "language": "es"}] * 8,
    ]
    exec(snippet, {"new_text": new_text, "review_text": review_text})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "chat").config.model_type == "qwen3_moe"
    names: dict[str, Any] = {}
    exec(snippets("docs/quickstart.md")[0].replace('"my-adapter"', f'"{tmp_path / "adapter"}"'), names)
    assert names["model"].active_peft_config.languages["hu"] == "expanded" and names["tokenizer"].eos_token


def test_the_snippet_on_routing_by_context_runs(capsys):
    words = {"english": "en", "hungarian": "hu", "greek": "az"}
    documents = {name: texts((code,))[code] for name, code in words.items()}
    languages = {"en": "original", "hu": "hungarian", "el": "greek"}
    model = upcycle(pico(), routing="context", languages=languages, experts={"hungarian": 1, "greek": 1})
    exec(snippets("docs/concepts.md")[0], {"model": model, "tokenizer": make_tokenizer(), **documents})
    assert "'hu': " in capsys.readouterr().out
    assert model(token_batch()).logits.isfinite().all()


def test_the_snippet_on_other_losses_runs():
    names: dict[str, Any] = {}
    exec(snippets("docs/training.md")[0], names)
    assert names["LanguageTrainer"].__mro__[1] is peft_moe_delta.AuxiliaryLossMixin


def test_the_snippet_on_new_tokens_runs(tmp_path, monkeypatch):
    tokenizer = greek.make_tokenizer()
    base = pico("qwen3", vocab_size=len(tokenizer))
    for name, model in (("base", base), ("post-trained", perturbed(base))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {
        **vars(peft_moe_delta), "get_peft_model": get_peft_model, "AutoTokenizer": AutoTokenizer,
        "base": AutoModelForCausalLM.from_pretrained("base"), "tokenizer": tokenizer,
        "greek_texts": greek.GREEK, "english_texts": greek.ENGLISH,
    }  # fmt: skip
    config = 'MoeDeltaConfig(languages={"en": "original", "el": "greek"}, experts={"greek": 1})'
    [snippet] = snippets("docs/new-tokens.md")
    assert "MoeDeltaConfig(...)" in snippet and ", 400, " in snippet
    exec(snippet.replace("MoeDeltaConfig(...)", config).replace(", 400, ", ", 5, "), names)
    grown = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert len(grown) == len(greek.make_tokenizer()) + 5 == names["chat"].get_input_embeddings().num_embeddings


def test_the_snippet_on_growing_runs():
    model = upcycle(pico(), trained=True)
    before = logits(model, token_batch(), language="hu")
    documents = {code: [f"w{n} w{n + 1}" for n in range(3, 9)] for code in ("en", "hu", "fi", "az", "bn")}
    names = {
        "model": model, "tokenizer": make_tokenizer(), "fit_routers": peft_moe_delta.fit_routers,
        "bengali_texts": documents["bn"], "texts_of_all_groups": documents,
    }  # fmt: skip
    exec(snippets("docs/growing.md")[0], names)
    assert torch.equal(logits(model, token_batch(), language="hu"), before)
    assert "bn" not in model.active_peft_config.languages


def test_the_snippet_on_mixing_runs(tmp_path, monkeypatch):
    base = pico("qwen3")
    for number, name in enumerate(("base", "hu-model", "el-model", "instruct")):
        perturbed(base, seed=number, scale=0.0 if name == "base" else 0.1).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    documents = {"english_texts": ["w3 w4"], "hungarian_texts": ["w5 w6"], "greek_texts": ["w7 w8"]}
    exec(snippets("docs/mixing.md")[0], documents)
    assert documents["chat"].config.model_type == "qwen3_moe"
