"""The engines' table against the layouts: what is chosen for an engine runs there, and the rest is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from builders import LANGUAGES, pico
from export.test_export import CASES, GRANITE_SCALES, LAYERS, LINEAR, LLAMA3, UNIFORM, WITH_DENSE
from export.upcycled import Mixture, plan_of, upcycle
from peft_moe_delta.engines import ARCHITECTURES, ENGINES, NOT_TRIED, OK, ROWS, cells_of, runs
from peft_moe_delta.errors import GraftError
from peft_moe_delta.export import (
    MOE_LAYOUTS,
    Layout,
    RemoteCodeLayout,
    build_model,
    check_equal_logits,
    choose,
    stock_fits,
    traits_of,
)
from peft_moe_delta.languages import LanguageTable

MORE = {
    "llama heads and rope": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}, UNIFORM),
    "qwen3 dense biases": ("qwen3", {"attention_bias": True}, WITH_DENSE),
    "granite dense layer": ("granite", GRANITE_SCALES, WITH_DENSE),
    "phi3 dense layer": ("phi3", {}, WITH_DENSE),
    "qwen2 rope linear": ("qwen2", {"rope_parameters": LINEAR}, WITH_DENSE),
}
FORMS = {name: case[:3] for name, case in CASES.items()} | MORE


def weights_of(kind, config, counts):
    return upcycle(pico(kind, **LAYERS, **config), plan_of(counts))


def by_language(weights):
    table = LanguageTable.build(LANGUAGES)
    return dataclasses.replace(weights, languages=table)


@pytest.mark.parametrize("case", FORMS)
def test_what_is_chosen_for_an_engine_is_exact_there(case):
    weights = weights_of(*FORMS[case])
    for fit in stock_fits(weights):
        assert cells_of(traits_of(weights, fit.layout))["transformers"] == OK, "every form has a row"
    for engine in ENGINES:
        try:
            chosen = choose(weights, serve_with=engine)
        except GraftError as error:
            assert str(error).startswith(f"{engine} (") and "What fits: " in str(error)
            assert "transformers" in str(error).partition("What fits: ")[2] and engine != "transformers"
        else:
            assert not chosen.misfits and runs(cells_of(traits_of(weights, chosen.layout))[engine])


def test_every_row_speaks_of_some_export():
    weights = [weights_of(*case) for case in FORMS.values()]
    traits = [traits_of(w, fit.layout) for w in weights for fit in stock_fits(w)]
    remote = [traits_of(w, RemoteCodeLayout()) for w in (weights[0], by_language(weights[0]))]
    shares = [weights[0].for_group("original"), weights_of(*FORMS["mistral window"]).for_group("original")]
    traits += [*remote, *(traits_of(share, Layout()) for share in shares)]
    assert [row.form for row in ROWS if not any(map(row.applies, traits))] == []


@pytest.mark.parametrize(
    ("case", "engine", "architecture", "replicates"),
    [
        ("llama", "vllm", "mixtral", False),
        ("qwen2", "vllm", "qwen2_moe", False),
        ("qwen2", "llama.cpp", "granitemoe", False),
        ("qwen2 tied", "mlx", "granitemoe", False),
        ("llama dense layer", "vllm", "qwen2_moe", False),
        ("llama dense layer", "llama.cpp", "mixtral", True),
        ("qwen3 dense layer", "mlx", "qwen3_moe", False),
        ("qwen3 dense layer", "llama.cpp", "qwen3_moe", True),
        ("qwen3 dense layer", "sglang", "qwen3_moe", True),
        ("granite dense layer", "openvino", "granitemoe", True),
        ("phi3 dense layer", "mlx", "mixtral", True),
        ("olmo2", "vllm", "flex_olmo", False),
    ],
)
def test_each_engine_gets_the_form_that_it_runs_and_that_form_is_the_mixture(case, engine, architecture, replicates):
    weights = weights_of(*FORMS[case])
    layout = choose(weights, serve_with=engine).layout
    assert (layout.name, layout.replicates) == (architecture, replicates)
    exported = build_model(weights, layout)
    assert exported.config.model_type == architecture
    check_equal_logits(Mixture(pico(FORMS[case][0], **LAYERS, **FORMS[case][1]), weights), exported)


@pytest.mark.parametrize(
    ("case", "engine", "reason"),
    [
        ("llama rope llama3", "mlx", r"mixtral: Mixtral with llama3 rope scaling in mlx: silently wrong.*in vllm,"),
        ("llama wide heads", "mlx", "its own head_dim in mlx: load error.*What fits: mixtral in vllm, llama.cpp, open"),
        ("mistral window", "llama.cpp", r"sliding window in llama.cpp: silently wrong.*mixtral in vllm, openvino, tr"),
        ("llama biases", "vllm", "GraniteMoe with biases in vllm: .*--model-impl transformers"),
        ("llama heads and rope", "sglang", "head_dim in sglang: ignored; Mixtral with llama3 rope scaling in sglang"),
        ("olmo2", "llama.cpp", "FlexOlmo in llama.cpp: unsupported"),
        ("qwen2 rope linear", "llama.cpp", "Qwen-MoE with another rope scaling in llama.cpp: not tried"),
        ("llama", "tgi", "no engine of the table; expected one of: vllm, llama.cpp"),
    ],
)  # fmt: skip
def test_what_an_engine_gets_wrong_is_refused_with_what_fits(case, engine, reason):
    with pytest.raises(GraftError, match=reason):
        choose(weights_of(*FORMS[case]), serve_with=engine)


def test_a_dense_mistral_keeps_its_window_only_where_the_engine_does():
    share = weights_of(*FORMS["mistral window"]).for_group("original")
    assert choose(share, serve_with="openvino").layout.name == "dense"
    with pytest.raises(
        GraftError, match=r"sliding window in llama.cpp: silently wrong.*What fits: mistral in vllm, openvi"
    ):
        choose(share, serve_with="llama.cpp")
    assert choose(weights_of("llama", {}, UNIFORM).for_group("original"), serve_with="llama.cpp")


def test_remote_code_is_for_engines_that_run_transformers_models():
    unequal = weights_of("llama", {}, [(1, 2), (1, 1), (1, 2)])
    for engine in ("vllm", "transformers"):
        assert choose(unequal, remote_code=True, serve_with=engine).layout.name == "remote code"
    for weights, engine in ((unequal, "llama.cpp"), (by_language(unequal), "vllm")):
        with pytest.raises(GraftError, match="What fits: remote code in .*transformers"):
            choose(weights, remote_code=True, serve_with=engine)


@pytest.mark.parametrize(
    ("case", "architecture", "copies", "replicates"),
    [
        ("qwen2", "granitemoe", False, False),
        ("llama", "granitemoe", False, False),
        ("llama dense layer", "mixtral", True, True),
        ("qwen3 dense layer", "qwen3_moe", False, False),
        ("qwen3 dense layer", "qwen3_moe", True, True),
    ],
)
def test_an_architecture_can_be_named(case, architecture, copies, replicates):
    weights = weights_of(*FORMS[case])
    layout = choose(weights, architecture=architecture, replicate_dense_layers=copies).layout
    assert (layout.name, layout.replicates) == (architecture, replicates)
    exported = build_model(weights, layout)
    check_equal_logits(Mixture(pico(FORMS[case][0], **LAYERS, **FORMS[case][1]), weights), exported)


def test_an_architecture_of_another_family_is_refused():
    with pytest.raises(GraftError, match="'mixtral' is no form of this model; expected one of: qwen2_moe, granitemoe"):
        choose(weights_of("qwen2", {}, UNIFORM), architecture="mixtral")
    with pytest.raises(GraftError, match="mixtral: all its layers are MoE"):
        choose(weights_of("llama", {}, WITH_DENSE), architecture="mixtral")
    share = weights_of("llama", {}, UNIFORM).for_group("original")
    with pytest.raises(GraftError, match="expected one of: dense"):
        choose(share, architecture="mixtral")


def test_not_tried_is_not_exact():
    assert tuple(dict.fromkeys(layout.name for layout in MOE_LAYOUTS)) == ARCHITECTURES
    assert runs(OK) and runs("ok, by its Transformers backend") and runs("not run")
    assert not any(map(runs, (NOT_TRIED, "silently wrong", "silently wrong, but ok with a flag", "ignored")))
