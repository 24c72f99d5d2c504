"""What lies beside a stock model's weights comes along wherever it is saved."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig, Trainer, TrainingArguments

from builders import token_batch
from greek import GREEK
from peft_moe_delta.graft.memory import to_stock

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture
def trio(make_trio_with_tokens):
    """With a chat template beside the post-trained model."""
    made = make_trio_with_tokens()
    (made.folder / "post" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return made


def test_saving_a_stock_model_brings_tokenizer_and_chat_template_along(trio, tmp_path):
    chat = trio.model.merge_and_graft(trio.folder / "post")
    chat.save_pretrained(tmp_path / "chat")
    tokenizer, post = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "chat", trio.folder / "post"))
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.get_vocab().items() >= post.get_vocab().items()
    first, tokens = chat.graft_report.first_new_token_id, chat.graft_report.new_tokens
    assert tokenizer.convert_ids_to_tokens(list(range(first, first + len(tokens)))) == list(tokens)
    assert len(tokenizer(GREEK[0])["input_ids"]) < len(post(GREEK[0])["input_ids"])
    assert GenerationConfig.from_pretrained(tmp_path / "chat").to_dict() == chat.generation_config.to_dict()


def test_without_new_tokens_the_files_are_copied_as_they_are(make_trio_with_tokens, tmp_path):
    trio = make_trio_with_tokens(new_tokens=False)
    trio.model.merge_and_graft(trio.folder / "post").save_pretrained(tmp_path / "chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "chat" / name).read_bytes() == (trio.folder / "post" / name).read_bytes()


def test_it_outlives_copies_pickling_generation_and_trainer(trio, tmp_path):
    chat = copy.deepcopy(trio.model.merge_and_graft(trio.folder / "post"))
    pickle.loads(pickle.dumps(chat)).save_pretrained(tmp_path / "pickled")
    chat.generate(token_batch(), max_new_tokens=2, do_sample=False, attention_mask=None)
    Trainer(chat, TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)).save_model(tmp_path / "saved")
    for folder in ("pickled", "saved"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == TEMPLATE


def test_a_tokenizer_that_is_gone_is_warned_of_and_the_weights_are_saved(trio, tmp_path):
    chat = trio.model.merge_and_graft(trio.folder / "post")
    shutil.rmtree(trio.folder / "post")
    with pytest.warns(UserWarning, match=r"Saved without a tokenizer: .*post"):
        chat.save_pretrained(tmp_path / "chat")
    assert (tmp_path / "chat" / "model.safetensors").is_file()


def test_an_adapter_without_a_graft_brings_its_bases_tokenizer(trio, tmp_path):
    to_stock(trio.model).save_pretrained(tmp_path / "stock")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "stock")) == 20 + len(
        AutoTokenizer.from_pretrained(trio.folder / "base")
    )
