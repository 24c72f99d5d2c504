"""The README's Python runs as it stands, but for names and numbers of steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from builders import perturbed, pico
from training.common import make_tokenizer

README = Path(__file__).parents[1] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_snippet_runs(tmp_path):
    snippet, _ = snippets()
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
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_snippet_on_mixing_runs(tmp_path, monkeypatch):
    base = pico("qwen3")
    for number, name in enumerate(("base", "hu-model", "el-model", "instruct")):
        perturbed(base, seed=number, scale=0.0 if name == "base" else 0.1).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    texts = {"english_texts": ["w3 w4"], "hungarian_texts": ["w5 w6"], "greek_texts": ["w7 w8"]}
    exec(snippets()[1], texts)
    assert texts["chat"].config.model_type == "qwen3_moe"
