"""A base that FSDP2 has sharded before it is upcycled: what is added is sharded with it, or refused.

One process is all of the group here; `tests/engines` has two, and compares them with one that knows no group.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from builders import moe_config, moe_layers, pico, randomise_experts, token_batch, upcycle
from peft_moe_delta.errors import ArchitectureError
from peft_moe_delta.tuner.processes import whole
from training.common import checkpoint


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(mesh, family="llama"):
    model = pico(family)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def a_pass(model):
    """The loss, and the gradients of what trains, whole."""
    tokens = token_batch()
    loss = model.train()(input_ids=tokens, labels=tokens, language_ids=torch.tensor([0, 1, 3])).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: whole(gradient) for name, gradient in gradients.items()}}


def checkpointed(model):
    checkpoint(model, use_reentrant=False)
    return model


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=["", "with replicas"])
def test_experts_are_sharded_as_the_mlp_is(mesh, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for layer in moe_layers(upcycle(sharded(mesh), experts={"uralic": 1, "turkic": 1}, attention_experts="full")):
        assert isinstance(layer, FSDPModule)
        for name, parameter in layer.base_layer.named_parameters():
            for expert in layer.new_experts("default"):
                own = expert.get_parameter(name)
                assert own.placements == parameter.placements and own.device_mesh == parameter.device_mesh
                assert own.requires_grad and own.to_local().data_ptr() != parameter.to_local().data_ptr()
                assert torch.equal(own.to_local(), parameter.to_local())
        assert all(isinstance(parameter, DTensor) for parameter in layer.parameters())


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gemma2", {}),
        ("falcon", {"routing": "language"}),  # edits its layers' output in place
        ("bloom", {}),  # adds the residual inside
        ("qwen3", {"expert_rank": 4}),
        ("qwen3", {"attention_experts": "shared_kv", "expert_rank": 4}),
    ],
)
@pytest.mark.parametrize("finish", [lambda model: model, checkpointed], ids=["", "checkpointed"])
def test_a_pass_is_that_of_a_base_in_one_piece(mesh, family, changes, finish):
    found = a_pass(finish(randomise_experts(upcycle(sharded(mesh, family), **changes))))
    expected = a_pass(randomise_experts(upcycle(pico(family), **changes)))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_upcycling_after_a_forward_pass(mesh):
    base = sharded(mesh)
    base(input_ids=token_batch())
    expected = a_pass(randomise_experts(upcycle(pico())))
    torch.testing.assert_close(a_pass(randomise_experts(upcycle(base))), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loads_onto_shards_and_knows_its_base(mesh, tmp_path, low_cpu_mem_usage):
    trained = upcycle(sharded(mesh), trained=True)
    trained.save_pretrained(tmp_path, state_dict={n: p for n, p in trained.state_dict().items() if "moe_delta_" in n})
    expected = a_pass(PeftModel.from_pretrained(pico(), tmp_path, is_trainable=True))
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    found = a_pass(PeftModel.from_pretrained(sharded(mesh), tmp_path, **options))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    records = [upcycle(base).peft_config["default"].record.base_fingerprint for base in (pico(), sharded(mesh))]
    assert records[0] == records[1]


def test_a_second_adapter_new_tokens_and_other_shards_are_refused(mesh):
    model = upcycle(sharded(mesh))
    with pytest.raises(ArchitectureError, match="sharded already, with an adapter, so"):
        model.add_adapter("other", moe_config())
    config = moe_config()
    config.change(new_tokens=["w99"], first_new_token_id=99)
    by_columns, without_weights = sharded(mesh), sharded(mesh)
    down = by_columns.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(distribute_tensor(whole(down.weight.detach()), mesh, [Shard(1)]))
    with pytest.raises(ArchitectureError, match="new tokens need whole, so"):
        get_peft_model(sharded(mesh), config)
    for base in (by_columns, without_weights.to("meta")):
        with pytest.raises(ArchitectureError, match=r"not by FSDP2 alone.*Load it with DistributedConfig\(fsdp_size="):
            get_peft_model(base, moe_config())
