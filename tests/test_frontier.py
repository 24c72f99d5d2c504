"""The frontier study: its methods run, its arithmetic is right, its intervals cover, its pages are of its scores."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence import PAGE, RESULTS
from frontier import family, material
from frontier.blocks import expanded, order
from frontier.curves import area, frontier, gain_at
from frontier.intervals import document_weights, interval, percentile_interval
from frontier.methods import METHODS
from frontier.pictures import draw
from frontier.runs import Run, carry_out
from frontier.scores import DOCUMENTS, Results
from frontier.study import Study, untried
from frontier.tables import NOTHING, filled, page
from pairs import Making, copy_of

from made_up import documents
from peft_moe_delta.errors import DataError

LANGUAGES = ("en", "hu", "el", "ru", "de")
PICO = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def text():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "QUESTIONS", {"validation": 4, "test": 6})
        train = {code: documents(code, 60, 50) for code in ("en", "hu", "el", "ru")}
        held_out = {
            part: {code: documents(code, 70, 50)[60 : 60 + number] for code in LANGUAGES}
            for part, number in (("validation", 2), ("test", 4), ("other", 3))
        }
        yield material.material_of(train, held_out)


@pytest.fixture(scope="module")
def pair(text):
    torch.manual_seed(0)
    making = Making("qwen3", shape=PICO)
    base = making.new_model(text.tokenizer).eval()
    tuned = copy_of(base).eval()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight) * 0.01)
    return material.pair_of(making, base, tuned)


@pytest.fixture(scope="module")
def short():
    """Few points and little calibration."""
    calibration = {**family.CALIBRATION, "steps": 1, "weights": (1.0,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "SHARES", (1.0,))
        patch.setattr(family, "SCALES", (1.0,))
        patch.setattr(family, "CALIBRATION", calibration)
        patch.setattr(family, "CALIBRATED_ON", 6)
        patch.setattr(family, "CONVERSATIONS", 3)
        yield


def run_into(folder: Path, text: material.Material, pair: material.Pair, methods: list[str]) -> Path:
    """Scores of two steps of training."""
    for method in methods:
        trains = METHODS[method].trains
        run = Run("qwen3", method, 2 if trains else 0, 0, 1e-3 if trains else 0.0)
        carry_out(run, pair, text, folder)
    return folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory, text, pair, short) -> Path:
    """A folder as the study leaves it."""
    folder = tmp_path_factory.mktemp("scores")
    (folder / DOCUMENTS).write_text(json.dumps(text.sizes()), encoding="utf-8")
    return run_into(folder, text, pair, ["post-trained", "dense", "ours-learned"])


def test_a_run_that_is_there_is_not_run_again(scores, text, pair):
    before = {file: file.stat().st_mtime_ns for file in scores.glob("*/*.json")}
    run_into(scores, text, pair, ["dense"])
    assert {file: file.stat().st_mtime_ns for file in scores.glob("*/*.json")} == before and len(before) == 3


def test_the_same_scores_give_the_same_tables_and_pictures(scores, tmp_path):
    made = []
    for name in ("first", "second"):
        results = Results.read(scores)
        pictures = draw(results, tmp_path / name)
        made.append((page(results, pictures), [picture.read_bytes() for picture in pictures]))
    assert made[0] == made[1]
    assert "ours learned, top-1" in made[0][0] and "![frontiers" in made[0][0] and len(made[0][1]) == 1


def test_what_is_compared_is_of_one_pair_of_models(scores, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(scores, both)
    [folder] = both.glob("qwen3-0-*")
    other = both / "qwen3-0-another"
    shutil.copytree(folder, other)
    for file in other.glob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**found, "pair_digest": "another"}), encoding="utf-8")
    (folder / "dense-2.json").unlink()  # neither of both is half of the other
    [setting] = Results.read(both).settings
    assert [digest for _, _, digest in Results.read(both).models(setting).values()] == ["another"]
    (other / "ours-learned-2.json").unlink()
    assert Results.read(both).seeds(setting) == []
    assert page(Results.read(both), []) == NOTHING


def test_runs_of_other_documents_are_not_compared(scores, tmp_path):
    shutil.copytree(scores, tmp_path / "mixed")
    [file] = (tmp_path / "mixed").glob("*/dense-2.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**found, "text_digest": "another"}), encoding="utf-8")
    with pytest.raises(DataError, match="other documents"):
        Results.read(tmp_path / "mixed")


def test_a_study_goes_on_with_what_is_not_there(scores, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(scores, results)
    methods = ("post-trained", "dense", "ours-learned")
    study = Study(tmp_path, tmp_path, results, tmp_path / "pairs", {"qwen3": (2, 4)}, (0, 1), methods, (1e-3,))
    left = [[(run.method, run.steps, run.seed) for run in runs] for runs in study.to_do()]
    assert left == [
        [("post-trained", 0, 0)], [("post-trained", 0, 1)],
        [("dense", 2, 1)], [("ours-learned", 2, 1)],
        [("dense", 4, 0)], [("ours-learned", 4, 0)], [("dense", 4, 1)], [("ours-learned", 4, 1)],
    ]  # fmt: skip
    assert replace(study, lengths={"qwen3": (2,)}, seeds=(0,)).to_do() == []
    assert replace(study, lengths={"qwen3": (2,)}, seeds=(0,), rates=(2e-3,)).to_do() != []  # of another rate


def test_rates_are_tried_until_the_best_has_worse_neighbours(tmp_path):
    study = Study(tmp_path, tmp_path, tmp_path, tmp_path)
    run, reached = Run("qwen3", "dense", 160, 0), {1e-4: 0.0, 3e-4: 0.3, 1e-3: 0.5, 3e-3: 0.2, 1e-2: 0.1, 3e-2: 0.0}
    (tmp_path / "rates").mkdir()
    tried = []
    while rates := untried(study, run):
        tried += rates
        for rate in rates:
            found = {"rate": rate, "reach": reached[rate], "criterion": 0.0}
            study.trial_file(replace(run, rate=rate)).write_text(json.dumps(found), encoding="utf-8")
    assert tried == [3e-3, 1e-3, 1e-2, 3e-4] and study.with_rate(run).rate == 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method, tmp_path, text, pair, short):
    [file] = run_into(tmp_path, text, pair, [method]).glob("*/*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["parameters"] >= pair.base.num_parameters() and found["flops"]["en"] > 0
    tested = [point["test"] for point in found["points"] if "test" in point]
    assert tested and all(np.isfinite(sum(map(sum, one["bits"].values()))) for one in tested)


def test_new_blocks_add_nothing_at_first(text, pair):
    assert order(4, 9) == [
        (0, False), (0, True), (0, True), (1, False), (1, True), (1, True),
        (2, False), (2, True), (2, True), (3, False), (3, True), (3, True), (3, True),
    ]  # fmt: skip
    deeper = expanded(pair.making, pair.base, text, 3, train_new=True)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(deeper(input_ids=ids).logits, pair.base(input_ids=ids).logits)
    trained = {name.split(".")[2] for name, weight in deeper.named_parameters() if weight.requires_grad}
    assert trained == {"1", "3", "4"}


def test_a_frontier_worked_by_hand():
    kept, gained = np.array([0.0, -0.1, -0.05, -0.2]), np.array([0.0, 0.5, 0.3, 0.4])
    assert frontier(kept, gained).tolist() == [0, 2, 1]
    r, x = kept[None, [0, 2, 1]], gained[None, [0, 2, 1]]
    assert gain_at(r, x, 0.0) == pytest.approx([0.0])
    assert gain_at(r, x, -0.025) == pytest.approx([0.15])
    assert gain_at(r, x, -0.5) == pytest.approx([0.5])
    assert np.isnan(gain_at(r, x, 0.01)).all()
    assert area(r, x, -0.05) == pytest.approx([0.15])
    assert gain_at(x, r, 0.4) == pytest.approx([-0.075])  # the mirror image


def coverage(noise: float, by_seed: float, sizes: list[int], seeds: int = 3, trials: int = 3000) -> tuple[float, float]:
    """How often an interval holds the true difference of two models in bits per byte: ours, and a percentile bootstrap.

    A document's difference is skewed and follows its size, as real ones do; every seed moves all documents at once, and
    each a little by itself.
    """
    rng, hits = np.random.default_rng(0), np.zeros(2)
    weights = document_weights(len(sizes), 200, 0)  # drawn once: the documents are others in each trial
    for trial in range(trials):
        n = np.array(sizes)[rng.integers(len(sizes), size=len(sizes))]
        by_document = noise * (rng.gamma(2.0, size=(len(n), 1)) - 2.0) / 2**0.5
        apart = by_seed / 4 * rng.normal(size=(len(n), seeds))
        bits = n[:, None] * (0.1 + by_document + apart + by_seed * rng.normal(size=seeds))
        figures = (weights @ bits) / (weights @ n)[:, None]
        found = interval(figures, len(n)), percentile_interval(figures, trial)
        hits += [one.low <= 0.1 <= one.high for one in found]
    ours, percentile = hits / trials
    return float(ours), float(percentile)


def sizes_of_documents() -> list[int]:
    """Bytes of the study's Greek test documents, the most uneven; or of such documents, until it has been run."""
    file = RESULTS / DOCUMENTS
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["test"]["el"]
    return [random.Random(i).randint(360, 760) for i in range(40)]


@pytest.mark.parametrize(("noise", "by_seed"), [(0.05, 0.0), (0.05, 0.004), (0.05, 0.02), (0.02, 0.05)])
def test_intervals_cover(noise, by_seed):
    covered, resampled = coverage(noise, by_seed, sizes_of_documents())
    print(f"noise of documents {noise}, of seeds {by_seed}: {covered:.1%}; percentile bootstrap {resampled:.1%}")
    assert covered >= 0.93


def test_the_page_is_that_of_the_committed_scores(tmp_path):
    results = Results.read(RESULTS)
    figures = draw(results, tmp_path)
    committed = PAGE.read_text(encoding="utf-8")
    assert filled(committed, page(results, figures)) == committed
    assert results.settings or NOTHING in committed
    for figure in figures:
        assert figure.read_bytes() == (PAGE.parent / "figures" / figure.name).read_bytes()
