"""`peft-moe-delta gguf`: the file answers as the export does, or there is none; the Modelfile's template is the
tokenizer's; what llama.cpp gets wrong is refused before."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from greek import make_tokenizer
from peft_moe_delta.cli import main
from peft_moe_delta.errors import ServingError
from peft_moe_delta.served.convert import DRIVER, cached, check_known, converter
from peft_moe_delta.served.modelfile import MARK, modelfile, turns_of
from peft_moe_delta.served.reference import Reference
from peft_moe_delta.served.rounding import SLACK, RoundedInputs, round_weights, rounded, tolerance_for
from served.forms import BY_LANGUAGE, REMOTE_CODE, make
from served.pico_export import TEMPLATE, export

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('in turns') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
EXCHANGED = ("block_sparse_moe.experts.0.", "block_sparse_moe.experts.1.")
ROLES = {
    "system": '{{ if eq .Role "system" }}%s{{ .Content }}%s{{ end }}',
    "user": '{{ if eq .Role "user" }}%s{{ .Content }}%s{{ end }}',
    "assistant": '{{ if eq .Role "assistant" }}%s{{ .Content }}%s{{ end }}',
}


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [TEMPLATE, CHATML, INST, GEMMA, CHATML.replace("Be kind.", "")])
def test_a_template_of_turns_is_found_out(template):
    turns = turns_of(tokenizer_with(template))
    assert turns is not None and MARK not in turns.go() and turns.go().count(".Content") == len(turns.around)


def test_the_same_conversation_in_gos_language():
    assert turns_of(tokenizer_with(INST)).go() == (
        "<bo{{ range .Messages }}" + ROLES["user"] % ("s>[INST] ", " [/INST]") + ROLES["assistant"] % (" ", "</")
        + "{{ end }}"
    )  # fmt: skip
    around = [ROLES["user"] % ("user\n", "<|im_end|>\n<|im_start|>")]
    around += [ROLES["assistant"] % ("assistant\n", "<|im_end|>\n<|im_start|>")]
    around += [ROLES["system"] % ("", "<|im_end|>\n<|im_start|>")]
    unasked = '{{ if ne (index .Messages 0).Role "system" }}Be kind.<|im_end|>\n<|im_start|>{{ end }}'
    assert turns_of(tokenizer_with(CHATML)).go() == (
        f"<|im_start|>system\n{unasked}{{{{ range .Messages }}}}{''.join(around)}{{{{ end }}}}assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% if loop.last %}!{% endif %}\n{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ strftime_now('%d') }}" + CHATML,
        "{% for m in messages %}{{ '{{' }}{{ m.content }}\n{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_does_more_is_left_out(template):
    assert turns_of(tokenizer_with(template)) is None


def test_a_modelfile_says_how_tokens_are_chosen(dense):
    text = modelfile("m.gguf", dense)
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """')
    assert 'PARAMETER temperature 0\nPARAMETER repeat_penalty 1.0\nPARAMETER stop "<eos>"\n' in text


def test_a_modelfile_of_a_model_that_samples(tmp_path):
    export(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[2, 1]).save_pretrained(tmp_path)
    tokenizer = tokenizer_with("{{ messages[-1].content }}")
    tokenizer.save_pretrained(tmp_path)
    assert modelfile("m.gguf", tmp_path).splitlines()[1:] == [
        "# The chat template does more than write turn after turn. Ollama has its own for templates that it knows; "
        "look what it took with `ollama show --template`.",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 1.0",
        "PARAMETER top_k 50",
        "PARAMETER repeat_penalty 1.0",
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<bos>"',
    ]


def test_rounding_is_that_of_the_type():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    step = weight.reshape(4, 2, 32).abs().amax(-1, keepdim=True) / 127
    pytest.importorskip("gguf")
    off = (rounded(weight, "q8_0") - weight).reshape(4, 2, 32).abs()
    assert (off <= 0.51 * step + 127 * step * 2**-11).all() and off.max() > 0
    assert torch.equal(rounded(weight[:, :40], "q8_0"), weight[:, :40].half().float())
    assert torch.equal(rounded(weight, "bf16"), weight.bfloat16().float())


@pytest.mark.parametrize(("form", "router"), [("Mixtral", ".gate.weight"), ("GraniteMoe", ".router.weight")])
def test_a_tolerance_is_what_rounding_does_and_routers_are_not_rounded(tmp_path, form, router):
    reference = Reference(str(make(form, tmp_path)))
    prompts = [reference.ids_of("the cat sat on the mat")]
    before, weights = reference.logprobs(prompts[0]), {n: p.clone() for n, p in reference.model.named_parameters()}
    assert tolerance_for(reference, prompts, "f32") == reference.tolerance == 1e-3
    tolerance = tolerance_for(reference, prompts, "bf16")
    with RoundedInputs(reference.model, "bf16"):
        moved = (reference.logprobs(prompts[0]) - before).abs().max().item()
    assert tolerance == pytest.approx(SLACK * moved) and moved > 1e-3
    kept = {n for n, p in reference.model.named_parameters() if torch.equal(p, weights[n])}
    assert kept == {n for n in weights if n.endswith((router, "norm.weight"))} and any(router in n for n in kept)


def expert_by_expert(experts, hidden, chosen, shares):
    """What a mixture computes of each token, (T, hidden), with what its matrices read in bf16."""
    output = torch.zeros_like(hidden)
    for token, row in enumerate(rounded(hidden, "bf16")):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
            output[token] += share * (experts.down_proj[expert] @ rounded(experts.act_fn(gate) * up, "bf16"))
    return output


def test_every_matrix_but_a_router_reads_rounded_inputs(tmp_path):
    """Counted out by hooks on linear modules, which routers are none of here, and a loop over tokens and experts."""
    model = Reference(str(make("Mixtral", tmp_path))).model
    ids = torch.arange(3, 15)[None]
    round_weights(model, "bf16")
    with torch.no_grad():
        weights_alone = model(ids).logits
        with RoundedInputs(model, "bf16"):
            found = model(ids).logits
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, given: (rounded(given[0], "bf16"),))
            if hasattr(module, "gate_up_proj"):
                module.forward = functools.partial(expert_by_expert, module)
        expected = model(ids).logits
    moved = (weights_alone - expected).abs().max()
    assert moved > 1e-3 and (found - expected).abs().max() < 0.1 * moved


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("Mixtral with a sliding window", "Mixtral with a sliding window in llama.cpp: silently wrong"),
        ("dense Mistral with a sliding window", "a sliding window in llama.cpp: silently wrong"),
        (REMOTE_CODE, "remote code in llama.cpp: unsupported"),
        (BY_LANGUAGE, "remote code by language, or with attention experts in llama.cpp: unsupported"),
        ("FlexOlmo", "FlexOlmo in llama.cpp: unsupported"),
    ],
)
def test_what_llama_cpp_gets_wrong_is_refused_before_anything_is_made(form, reason, tmp_path, capsys):
    folder = make(form, tmp_path / "export")
    with pytest.raises(SystemExit) as stopped:
        main(["gguf", str(folder), str(tmp_path / "out"), "--llama-cpp", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and reason in said and "--for llama.cpp" in said
    assert not (tmp_path / "out").exists()


def test_what_was_not_tried_may_be_tried(tmp_path):
    check_known(make("Qwen-MoE with another rope scaling", tmp_path))


FAKE = """
import json, sys
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer != "known":
            raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
        return "by hash"
def main():
    print(json.dumps([TextModel().get_vocab_base_pre({tokenizer!r}), sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("pre", "tokenizer", "expected"), [("qwen2", "grown", "qwen2"), ("", "known", "by hash"), ("", "grown", None)]
)
def test_the_converter_is_told_the_pre_tokenizer(pre, tokenizer, expected, tmp_path):
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(FAKE.replace("{tokenizer!r}", repr(tokenizer)))
    run = subprocess.run([sys.executable, DRIVER, script, pre, "--outfile", "x"], capture_output=True, text=True)
    if expected is None:
        assert run.returncode and "was not recognized" in run.stderr
    else:
        assert json.loads(run.stdout) == [expected, ["--outfile", "x"]]


def test_an_unknown_pre_tokenizer_is_an_error_that_says_what_to_give(dense, tmp_path, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(FAKE.replace("{tokenizer!r}", "'grown'"))
    line = ["gguf", str(dense), str(tmp_path / "out"), "--llama-cpp", str(tmp_path)]
    for more, said in (
        ([], "cuts text, as it knows published tokenizers only. Say it with --pre-tokenizer"),
        (["--pre-tokenizer", "gpt-2"], "llama.cpp's converter refuses"),  # which writes no file
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*line, *more])
        assert stopped.value.code == 1 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_tokenizer_that_cuts_otherwise_does_not_stand_for_another(dense, tmp_path, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(FAKE)
    other = AutoTokenizer.from_pretrained(dense)
    other.backend_tokenizer.pre_tokenizer = type(other.backend_tokenizer.pre_tokenizer)(add_prefix_space=True)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        main(
            [
                "gguf",
                str(dense),
                str(tmp_path / "out"),
                "--llama-cpp",
                str(tmp_path),
                "--pre-tokenizer",
                str(tmp_path / "other"),
            ]
        )
    assert "have different pre_tokenizers" in capsys.readouterr().err


def test_a_folder_without_the_converter_is_refused(tmp_path):
    with pytest.raises(ServingError, match="no convert_hf_to_gguf.py in .*or leave it out"):
        converter(tmp_path)


@pytest.fixture(scope="session")
def llama_cpp():
    """What runs and makes a GGUF file."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    if not cached().is_dir():
        pytest.skip(f"no llama.cpp sources in {cached()}; make test-served fetches them")


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """A small Mixtral."""
    return make("Mixtral", tmp_path_factory.mktemp("mixtral") / "pico-mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_a_file_answers_as_the_export_does(llama_cpp, mixtral, outtype, tmp_path, capsys):
    main(["gguf", str(mixtral), str(tmp_path), "--outtype", outtype, "--pre-tokenizer", "gpt-2"])
    said = capsys.readouterr().out
    name = f"pico-mixtral-{outtype}.gguf"
    assert f"{name} agrees with" in said and {file.name for file in tmp_path.iterdir()} == {name, "Modelfile"}
    rows = json.loads((mixtral / "served.json").read_text())["verified"]
    assert [row["engine"] for row in rows if row["form"] == name] == ["llama.cpp"]
    assert "TEMPLATE" in (tmp_path / "Modelfile").read_text()
    fields = pytest.importorskip("gguf").GGUFReader(tmp_path / name)
    told = {"tokenizer.chat_template": TEMPLATE, "general.name": "pico-mixtral", "tokenizer.ggml.pre": "gpt-2"}
    assert {key: fields.get_field(key).contents() for key in told} == told


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(llama_cpp, mixtral, tmp_path, capsys):
    line = ["gguf", str(mixtral), str(tmp_path), "--outtype", "f16", "--pre-tokenizer", "gpt-2", "--max-tokens", "2"]
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--tolerance", "1e-9"])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "No file was written. Try --outtype f32" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_with_two_experts_exchanged_is_out_of_what_rounding_may_do(llama_cpp, mixtral, tmp_path, capsys):
    main(["gguf", str(mixtral), str(tmp_path / "right"), "--pre-tokenizer", "gpt-2"])
    rows = json.loads((mixtral / "served.json").read_text())["verified"]
    (right,) = (row for row in rows if row["form"] == "pico-mixtral-q8_0.gguf")
    assert 0 < right["difference"] < right["tolerance"]
    exchanged = shutil.copytree(mixtral, tmp_path / "exchanged")
    (file,) = exchanged.glob("*.safetensors")
    weights = load_file(file)
    first, second = ([name for name in weights if f"layers.1.{part}" in name] for part in EXCHANGED)
    changed = dict(zip([*first, *second], [weights[name] for name in [*second, *first]], strict=True))
    save_file(weights | changed, file, metadata={"format": "pt"})
    main(["gguf", str(exchanged), str(tmp_path / "wrong"), "--pre-tokenizer", "gpt-2", "--no-check"])
    capsys.readouterr()
    asked = ["--gguf", str(tmp_path / "wrong" / "exchanged-q8_0.gguf"), "--tolerance", str(right["tolerance"])]
    with pytest.raises(SystemExit) as stopped:
        main(["verify-served", str(mixtral), *asked])
    assert stopped.value.code == 1 and "does not agree with" in capsys.readouterr().out


def test_a_mixtures_experts_are_no_linear_modules_which_is_all_that_other_libraries_quantise(tmp_path):
    model = Reference(str(make("Mixtral", tmp_path))).model
    linear = {id(p) for module in model.modules() if isinstance(module, torch.nn.Linear) for p in module.parameters()}
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert experts and all(id(p) not in linear and p.dim() == 3 for p in experts)
