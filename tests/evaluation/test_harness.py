"""lm-evaluation-harness runs adapters and what is exported from them, with the language of each task."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from builders import perturbed, pico, randomise, randomise_experts, upcycle
from evaluation.sample_report import sample_report
from greek import GREEK, make_tokenizer
from peft_moe_delta import extend_vocabulary, propose_tokens
from peft_moe_delta.cli import main
from peft_moe_delta.errors import DataError, LanguageError
from peft_moe_delta.evaluation import bits_per_byte, encode_task, exact_match
from peft_moe_delta.evaluation.harness_files import with_harness_results, write_harness_tasks
from peft_moe_delta.languages import LanguageTable
from peft_moe_delta.tuner.vocabulary import grown_layers
from recipe.pico_recipe import SENTENCES, pico_model, pico_recipe, pico_tokenizer, write_lines

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from peft_moe_delta.evaluation.harness import MoeDeltaLM, language_of_task  # noqa: E402

WINDOW = 48
TEXTS = {code: [f"{sentence} {index}" * (1 + index) for index in range(4)] for code, sentence in SENTENCES.items()}
LANGUAGES = {"en": "original", "hu": "uralic", "el": "greek"}
EXPERTS = {"uralic": 1, "greek": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base, an adapter that routes by language, one that is grafted with a learned router, its export, and tasks."""
    root = tmp_path_factory.mktemp("harness")
    base = pico_model()
    for name, model in (("base", base), ("post_trained", perturbed(base, scale=0.05))):
        model.save_pretrained(root / name)
        pico_tokenizer().save_pretrained(root / name)
    hard = upcycle(load(root / "base"), routing="language", top_k=1, languages=LANGUAGES, experts=EXPERTS)
    randomise_experts(hard).save_pretrained(root / "hard")
    learned = upcycle(load(root / "base"), languages=LANGUAGES, experts=EXPERTS, trained=True)
    learned.graft(root / "post_trained").save_pretrained(root / "grafted")
    learned.merge_and_graft(root / "post_trained").save_pretrained(root / "stock")
    pico_tokenizer().save_pretrained(root / "stock")
    files = {code: write_lines(root / f"{code}.jsonl", [{"text": t} for t in texts]) for code, texts in TEXTS.items()}
    questions = write_lines(root / "tasks.jsonl", [{"prompt": f"say {n}:", "answer": f" {n}"} for n in range(3)])
    write_harness_tasks(root / "tasks", files, {"Saying": questions})
    return root


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def evaluate(lm: MoeDeltaLM, folder: Path, tasks: list[str]) -> dict:
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    return results["results"]


def adapter_lm(folder: Path, adapter: str, **options) -> MoeDeltaLM:
    over = "post_trained" if adapter == "grafted" else "base"
    options = {"dtype": "float32", "device": "cpu", "max_length": WINDOW, "batch_size": 2, **options}
    return MoeDeltaLM(pretrained=str(folder / over), peft=str(folder / adapter), **options)


def test_each_task_runs_on_its_languages_experts_and_agrees_with_our_bits_per_byte(folder):
    lm = adapter_lm(folder, "hard")
    found = evaluate(lm, folder, [f"moe_delta_text_{code}" for code in TEXTS])
    model, tokenizer = PeftModel.from_pretrained(load(folder / "base"), folder / "hard"), pico_tokenizer()
    for code, texts in TEXTS.items():
        ours = bits_per_byte(model, tokenizer, texts, language=code, max_length=WINDOW, stride=WINDOW).value
        assert math.isclose(found[f"moe_delta_text_{code}"]["bits_per_byte,none"], ours, rel_tol=1e-5)
    other = bits_per_byte(model, tokenizer, TEXTS["hu"], language="el", max_length=WINDOW, stride=WINDOW).value
    assert not math.isclose(found["moe_delta_text_hu"]["bits_per_byte,none"], other, rel_tol=1e-3)
    assert lm._tuner.model._moe_delta_context.language is None


def test_answers_come_back_in_the_order_of_their_requests(folder):
    """Tasks of three languages in one call, against each language alone."""
    tasks = [f"moe_delta_text_{code}" for code in TEXTS]
    together = evaluate(adapter_lm(folder, "hard"), folder, tasks)
    for task in tasks:
        alone = evaluate(adapter_lm(folder, "hard", batch_size=1), folder, [task])
        assert math.isclose(alone[task]["bits_per_byte,none"], together[task]["bits_per_byte,none"], rel_tol=1e-5)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_new_tokens_and_padded_rows_count_as_in_our_bits_per_byte(tmp_path, with_tokenizer):
    """`hf` reads the base's tokenizer, and resizes the base, which shrinks its softmax by the padded rows."""
    tokenizer = make_tokenizer()
    base = pico(vocab_size=len(tokenizer) + 6, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_harness_tasks(
        tmp_path / "tasks", {"hu": write_lines(tmp_path / "hu.jsonl", [{"text": t} for t in GREEK])}, {}
    )
    model = upcycle(load(tmp_path / "base"), routing="language", top_k=1, trained=True)
    plain = bits_per_byte(model, tokenizer, GREEK, language="hu", max_length=WINDOW, stride=WINDOW).value
    model.save_pretrained(tmp_path / "adapter")
    options = {"pretrained": str(tmp_path / "base"), "peft": str(tmp_path / "adapter"), "max_length": WINDOW}
    task = "moe_delta_text_hu"
    found = evaluate(MoeDeltaLM(**options, dtype="float32", device="cpu"), tmp_path, [task])
    assert found[task]["bits_per_byte,none"] == pytest.approx(plain, rel=1e-5)

    extend_vocabulary(model, tokenizer, propose_tokens(GREEK, tokenizer, 20))
    for layer in grown_layers(model.base_model.model):
        randomise(layer.moe_delta_rows, 3, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    if with_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    grown = bits_per_byte(model, tokenizer, GREEK, language="hu", max_length=WINDOW, stride=WINDOW).value
    assert grown != pytest.approx(plain, rel=0.01)
    found = evaluate(MoeDeltaLM(**options, dtype="float32", device="cpu"), tmp_path, [task])
    assert found[task]["bits_per_byte,none"] == pytest.approx(grown, rel=1e-5)


def test_a_task_without_language_is_refused_where_routing_needs_one(folder):
    with pytest.raises(DataError, match="task 'saying' names none of the adapter's languages .*task_languages="):
        evaluate(adapter_lm(folder, "hard"), folder, ["saying"])
    evaluate(adapter_lm(folder, "hard", task_languages="say*:hu"), folder, ["saying"])
    evaluate(adapter_lm(folder, "hard", language="hu"), folder, ["saying"])
    with pytest.raises(LanguageError, match="'xx'"):
        adapter_lm(folder, "hard", language="xx")
    with pytest.raises(DataError, match="expected PATTERN:CODE"):
        adapter_lm(folder, "hard", task_languages="hu")


@pytest.mark.parametrize(
    ("task", "code"),
    [
        ("belebele_hun_Latn", "hu"),
        ("belebele_ell_Grek", "el"),
        ("arc_hu", "hu"),
        ("hellaswag_el", "el"),
        ("m_mmlu_hu", "hu"),
        ("global_mmlu_full_en_anatomy", "en"),
        ("flores_en-hu", "hu"),
        ("flores_hun_Latn-ell_Grek", "el"),
        ("arc_challenge", None),
        ("hellaswag_de", None),
        ("truthful_qa", None),
    ],
)
def test_a_tasks_name_gives_its_language(task, code):
    table = LanguageTable.build(LANGUAGES)
    assert language_of_task(task, table) == code
    assert language_of_task(task, table, {"*": "en"}) == "en"


def test_the_adapters_own_spelling_of_a_code_is_kept():
    table = LanguageTable.build({"eng_Latn": "original", "hun_Latn": "uralic", "mine": "uralic"})
    assert language_of_task("arc_hu", table) == "hun_Latn"
    assert language_of_task("saying_mine", table) is None
    assert language_of_task("saying_mine", table, {"*_mine": "mine"}) == "mine"


def test_adapter_and_export_give_equal_results(folder):
    """The grafted adapter, and the stock model as any `lm_eval` runs it."""
    tasks = ["moe_delta_text_hu", "moe_delta_text_el", "saying"]
    adapter = evaluate(adapter_lm(folder, "grafted"), folder, tasks)
    options = {"dtype": "float32", "device": "cpu", "max_length": WINDOW, "batch_size": 2}
    stock = evaluate(HFLM(pretrained=str(folder / "stock"), **options), folder, tasks)
    for task in tasks[:2]:
        assert math.isclose(adapter[task]["bits_per_byte,none"], stock[task]["bits_per_byte,none"], rel_tol=1e-5)
    assert adapter["saying"] == stock["saying"]


@pytest.mark.slow  # lm_eval's command line reads all its thousands of tasks at each start
def test_the_command_line_gives_equal_results_for_adapter_and_export(folder, tmp_path):
    """`lm_eval`'s own command line in a process of its own, once over the adapter and once over the stock model."""
    tasks = "moe_delta_text_hu,saying"
    models = {
        "adapter": f"pretrained={folder / 'post_trained'},peft={folder / 'grafted'}",
        "stock": f"pretrained={folder / 'stock'}",
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = {}
    for name, arguments in models.items():
        kind = "moe_delta" if name == "adapter" else "hf"
        command = ["--model", kind, "--model_args", f"{arguments},dtype=float32,max_length={WINDOW}"]
        command += ["--tasks", tasks, "--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "4"]
        command += ["--output_path", str(tmp_path / name)]
        start = "from peft_moe_delta.cli.harness import lm_eval_main; lm_eval_main()"
        run = subprocess.run(
            [sys.executable, "-c", start, *command], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr
        assert "moe_delta_text_hu" in run.stdout
        (file,) = (tmp_path / name).rglob("results_*.json")
        found[name] = json.loads(file.read_text())["results"]
    adapter, stock = (found[name]["moe_delta_text_hu"]["bits_per_byte,none"] for name in models)
    assert math.isclose(adapter, stock, rel_tol=1e-5)
    ours = bits_per_byte(load(folder / "stock"), pico_tokenizer(), TEXTS["hu"], max_length=WINDOW, stride=WINDOW)
    assert math.isclose(stock, ours.value, rel_tol=1e-5)
    assert found["adapter"]["saying"] == found["stock"]["saying"]

    report = with_harness_results(sample_report(), tmp_path / "adapter", model="ours")
    (row,) = (score for score in report.scores if score.task == "held-out text (lm_eval)")
    assert (row.model, row.metric, row.language, row.status) == ("ours", "bits_per_byte", "hu", "expanded")
    assert row.value == adapter and not row.higher_is_better and row.items == 4
    assert report.versions["lm_eval"]


def test_results_become_rows(tmp_path):
    results = {
        "results": {
            "arc_hu": {"alias": "arc_hu", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6},
            "mmlu": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        },
        "higher_is_better": {"arc_hu": {"acc": True}},
        "n-samples": {"arc_hu": {"original": 10, "effective": 8}},
        "lm_eval_version": "0.4.13",
    }
    (tmp_path / "results_2026.json").write_text(json.dumps(results))
    report = with_harness_results(sample_report(), tmp_path, model="another")
    assert [model.name for model in report.models][-1] == "another"
    acc, norm, strict = report.scores[len(sample_report().scores) :]
    assert (acc.task, acc.metric, acc.language, acc.status, acc.items) == ("arc_hu", "acc", "hu", "expanded", 8)
    assert (acc.low, acc.high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196))
    assert (norm.metric, norm.low) == ("acc_norm", None)
    assert (strict.metric, strict.language, strict.low) == ("exact_match (strict)", None, None)
    mapped = with_harness_results(sample_report(), tmp_path, model="ours", languages={"mmlu": "en"})
    assert mapped.scores[-1].language == "en" and mapped.models == sample_report().models


def test_what_lm_eval_did_not_write_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds 0 files"):
        with_harness_results(sample_report(), tmp_path, model="ours")
    (tmp_path / "results_1.json").write_text("[]")
    with pytest.raises(DataError, match="is no result of lm_eval"):
        with_harness_results(sample_report(), tmp_path, model="ours")
    with pytest.raises(DataError, match="No file .*nothing.jsonl"):
        write_harness_tasks(tmp_path, {"hu": tmp_path / "nothing.jsonl"}, {})


def test_the_commands_write_tasks_of_a_recipe_and_read_results(tmp_path, capsys):
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(pico_recipe(tmp_path), sort_keys=False))
    main(["harness-tasks", str(recipe), str(tmp_path / "tasks")])
    names = capsys.readouterr().out.strip().split(",")
    assert names == ["moe_delta_text_en", "moe_delta_text_hu", "moe_delta_text_el", "saying"]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert set(names) <= set(manager.all_tasks)
    sample_report().save(tmp_path / "report")
    (tmp_path / "results_1.json").write_text(json.dumps({"results": {"arc_hu": {"acc,none": 0.5}}}))
    main(["harness-results", str(tmp_path / "report"), str(tmp_path / "results_1.json"), "--model", "ours"])
    assert "arc_hu" in (tmp_path / "report/report.json").read_text()


def test_exact_match_agrees_with_ours(folder, tmp_path, holds):
    """On a model that was taught some of the answers."""
    questions = [{"prompt": f"say {n}:", "answer": f" {n}"} for n in range(4)]
    model, tokenizer = load(folder / "base"), pico_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [encode_task(tokenizer, q["prompt"], q["answer"]) for q in questions[:2]]  # of one length
    input_ids, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    for _ in range(60):
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = exact_match(model, tokenizer, questions)
    holds(ours.value, above=0, below=1)
    write_harness_tasks(tmp_path / "tasks", {}, {"Saying": write_lines(tmp_path / "tasks.jsonl", questions)})
    lm = MoeDeltaLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert evaluate(lm, tmp_path, ["saying"])["saying"]["exact_match,none"] == ours.value


def adding_bos(tokenizer):
    beginning = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = beginning
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompts_and_texts_begin_as_in_our_scores_whatever_the_tokenizer_adds(folder, adds_bos):
    """Tokens as `lm_eval` makes them, and a whole text's bits per byte."""
    model, tokenizer = load(folder / "base"), adding_bos(pico_tokenizer()) if adds_bos else pico_tokenizer()
    before = tokenizer("say 1:")["input_ids"]
    lm = MoeDeltaLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=WINDOW)
    ids, labels = encode_task(tokenizer, "say 1:", " 1")
    context = ids[: labels.count(-100)]
    assert lm.tok_batch_encode(["say 1:"])[0].tolist() == [context] and lm.tok_encode("say 1:") == context
    assert lm._encode_pair("say 1:", " 1") == (context, ids[len(context) : -1])
    assert evaluate(lm, folder, ["moe_delta_text_hu"])["moe_delta_text_hu"]["bits_per_byte,none"] == pytest.approx(
        bits_per_byte(model, tokenizer, TEXTS["hu"], max_length=WINDOW).value, rel=1e-5
    )
    assert tokenizer("say 1:")["input_ids"] == before and lm.add_bos_token is None
