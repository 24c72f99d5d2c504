"""Explaining an adapter reads configs alone and agrees with what exporting does."""

import pytest

from builders import pico, upcycle
from peft_moe_delta.cli import main
from peft_moe_delta.engines import ENGINES
from peft_moe_delta.errors import CheckpointError, GraftError
from peft_moe_delta.graft.explain import explain
from peft_moe_delta.graft.files import graft_checkpoint
from peft_moe_delta.graft.memory import to_stock


def saved(folder, family="llama", **changes):
    """An adapter folder and its base model's config, both without weights."""
    base = pico(family)
    base.name_or_path = str(folder / "base")
    base.config.save_pretrained(folder / "base")
    model = upcycle(base, **changes)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    return model, folder / "adapter"


def by_target(fits):
    return {fit.target: fit.misfits for fit in fits}


def test_every_form_has_its_reasons(tmp_path):
    _, adapter = saved(tmp_path, experts={"uralic": [2, 1], "turkic": 1})
    found = by_target(explain(adapter))
    assert found["dense llama"] == ("the layers [0, 1] have more than one expert",)
    assert "[4, 3]" in found["mixtral"][0]
    assert found["flex_olmo"] == ("it holds mixtures of olmo2 models",)
    assert found["remote code (trust_remote_code=True)"] == ()
    assert "every token may use every expert" in found["one language alone"][0]
    assert found["adapter over the post-trained model (graft)"] == ()


def test_routing_by_language_names_what_each_language_runs_on(tmp_path):
    _, adapter = saved(tmp_path, routing="language", experts={"uralic": 2, "turkic": 1})
    found = by_target(explain(adapter))
    assert found["mixtral"] == ("it has no input for a token's language",)
    assert found['language="hu or fi": mixtral'] == ()
    assert found['language="az": llama'] == ()
    assert found['language="en": llama'] == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"routing": "classifier", "classifier_layers": [1]}, "no gate before them"),
        ({"attention_experts": "full"}, "no attention experts (attention_experts='full')"),
        ({"norm_topk_prob": False, "top_k": 1}, "norm_topk_prob=False does not"),
    ],
)
def test_what_only_remote_code_holds(tmp_path, changes, reason):
    model, adapter = saved(tmp_path, **changes)
    found = by_target(explain(adapter))
    assert reason in found["mixtral"][0]
    assert found["remote code (trust_remote_code=True)"] == ()
    assert to_stock(model, remote_code=True).config.model_type == "moe_delta_llama"


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "granite", "gemma", "phi3"])
@pytest.mark.parametrize("experts", [{"uralic": 2, "turkic": 1}, {"uralic": [2, 0], "turkic": [1, 0]}])
def test_it_agrees_with_exporting(family, experts, tmp_path):
    model, adapter = saved(tmp_path, family, experts=experts)
    stock = [fit.target for fit in explain(adapter) if not fit.misfits]
    assert to_stock(model, replicate_dense_layers=True).config.model_type == stock[0].split()[0]


def test_the_command_prints_one_line_a_form(tmp_path, capsys):
    _, adapter = saved(tmp_path)
    main(["explain", str(adapter)])
    forms, _, engines = capsys.readouterr().out.partition("\n\n")
    assert "yes  mixtral: exact" in forms.splitlines()
    assert all(line.startswith(("yes  ", "no   ")) for line in forms.splitlines())
    title, header, *rows = engines.splitlines()
    assert title.startswith("What engines do with what fits, as measured at ")
    assert header.split() == ["engine", *ENGINES]
    assert {row.split()[0]: row.split()[1:4] for row in rows}["mixtral"] == ["ok", "ok", "ok"]
    assert [row.split()[0] for row in rows] == ["mixtral", "qwen2_moe", "granitemoe", "remote"]


def test_memory_files_and_the_command_take_the_form_for_an_engine(make_trio, tmp_path, capsys):
    trio = make_trio("qwen2")
    chat = trio.model.merge_and_graft(trio.folder / "post", serve_with="llama.cpp")
    assert chat.graft_report.layout == "granitemoe" and "; llama.cpp (" in chat.graft_report.choice
    assert to_stock(trio.model, architecture="granitemoe").config.model_type == "granitemoe"
    report = graft_checkpoint(*trio.paths, tmp_path / "mlx", serve_with="mlx", check=True)
    assert (report.layout, report.max_logit_difference < 1e-4) == ("granitemoe", True)
    main(["graft", *map(str, trio.paths), str(tmp_path / "out"), "--for", "llama.cpp"])
    assert "granitemoe, which holds this 'qwen2' model exactly; llama.cpp (" in capsys.readouterr().out
    for target, message in (("remote_code", "remote code in llama.cpp: unsupported"), ("adapter", "not in llama.cpp")):
        with pytest.raises(GraftError, match=message):
            graft_checkpoint(*trio.paths, tmp_path / target, target=target, serve_with="llama.cpp")
    with pytest.raises(GraftError, match=r"leave out .*architecture="):
        graft_checkpoint(*trio.paths, tmp_path / "x", target="remote_code", architecture="qwen2_moe")


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot load a config of an adapter"):
        explain(tmp_path)


def test_a_base_model_that_is_not_there_is_refused(tmp_path):
    _, adapter = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)Cannot load a config of .*nowhere.*--post-trained"):
        explain(adapter, tmp_path / "nowhere")
