"""`--check`: what was written computes what the adapter computes, and a wrong export does not appear."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_moe_delta import graft_checkpoint
from peft_moe_delta.checkpoint import verify
from peft_moe_delta.errors import GraftError
from peft_moe_delta.graft.targets import StockTarget

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("expert_rank", [None, 4])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16)])
def test_a_right_export_passes_and_says_how_near_it_is(make_trio, dtypes, expert_rank, holds):
    trio = make_trio("qwen3", dtypes, expert_rank=expert_rank)
    report = graft_checkpoint(*trio.paths, trio.folder / "out", scale=0.75, expert_scale=0.5, check=True)
    assert 0 <= report.max_logit_difference <= 1e-4
    assert (report.route_agreement is None) == (dtypes[1] == F32)
    if report.route_agreement is not None:
        holds(report.route_agreement, above=0.9, name="from files")
        assert report.route_agreement <= 1
    assert verify(trio.folder / "out")["report"]["max_logit_difference"] == report.max_logit_difference
    if dtypes == (BF16, BF16, F32):
        grafted = trio.model.merge_and_graft(trio.folder / "post")
        holds(grafted.graft_report.route_agreement, above=0.9, name="in memory")


@pytest.mark.parametrize("language", ["hu", "az"])
def test_one_language(make_trio, language):
    trio = make_trio("llama", routing="language")
    report = graft_checkpoint(*trio.paths, trio.folder / "out", language=language, check=True)
    assert report.max_logit_difference <= 1e-4


@pytest.mark.parametrize("routing", ["language", "learned"])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32)])
def test_an_adapter(make_trio, routing, dtypes):
    trio = make_trio("llama", dtypes, routing=routing)
    report = graft_checkpoint(*trio.paths, trio.folder / "out", target="adapter", check=True)
    assert report.max_logit_difference <= 1e-4


@pytest.mark.parametrize("wrong", [{"rope_theta": 5e3}, {"num_experts_per_tok": 1}])
def test_a_wrong_export_does_not_appear(make_trio, monkeypatch, wrong):
    trio = make_trio("llama")
    write = StockTarget.write_config

    def write_wrong(self, folder, report):
        write(self, folder, report)
        config = json.loads((folder / "config.json").read_text()) | wrong
        config["rope_parameters"] |= {key: wrong[key] for key in ("rope_theta",) if key in wrong}
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(StockTarget, "write_config", write_wrong)
    with pytest.raises(GraftError, match="not exact"):
        graft_checkpoint(*trio.paths, trio.folder / "out", check=True)
    assert sorted(path.name for path in trio.folder.iterdir()) == ["adapter", "base", "post"]


def test_what_overflows_in_fp16_is_refused_on_both_roads(make_trio):
    """An expert, a router and a low-rank expert whose numbers are too large for the post-trained model's dtype."""
    for kind, rank in (("experts", None), ("router", None), ("experts", 4)):
        trio = make_trio("llama", (F16, F16, F32), expert_rank=rank)
        for name, parameter in trio.model.named_parameters():
            if f"moe_delta_{kind}.default" in name and "layers.1." in name:
                parameter.data = parameter.data.float() * 1e6
        trio.model.save_pretrained(trio.folder / "adapter")
        with pytest.raises(GraftError, match=r"float16"):
            graft_checkpoint(*trio.paths, trio.folder / "out", check=True)
        with pytest.raises(GraftError, match=r"float16"):
            trio.model.merge_and_graft(trio.folder / "post")
        assert not (trio.folder / "out").exists()


@pytest.mark.filterwarnings("ignore:Grafting looks doubtful")
def test_finite_weights_whose_states_overflow_are_refused(make_trio):
    trio = make_trio("llama", (F16, F16, F16))
    files = sorted((trio.folder / "post").glob("*.safetensors"))
    file = next(file for file in files if any("down_proj" in name for name in load_file(file)))
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("mlp.down_proj.weight"):
            tensors[name] = (tensors[name].float() * 1e5).clamp(-6e4, 6e4).half()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GraftError, match="not finite in torch.float16: it overflows"):
        graft_checkpoint(*trio.paths, trio.folder / "out", check=True)
