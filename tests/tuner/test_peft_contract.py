"""PEFT's own contract tests, run over this method's configuration.

They are no part of this repository: `make test-peft-contract` fetches the sources of the PEFT that is installed, of
which `tests/testing_common.py` says what every method must do. `CONTRACT` lists all of it, and `DOES_NOT_APPLY` what is
left out, and why.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from builders import moe_config, pico, randomise_experts
from peft_moe_delta import MoeDeltaConfig

SOURCES = Path(__file__).resolve().parents[2] / "build" / "peft-contract" / f"peft-{peft.__version__}"
FAMILIES = ("llama", "qwen3", "gpt2")
KINDS: dict[str, dict[str, Any]] = {
    "full, learned": {},
    "low-rank, learned": {"expert_rank": 2},
    "full, by language": {"routing": "language"},
    "low-rank, by language": {"routing": "language", "expert_rank": 2},
}

MERGING = "experts cannot be merged into one MLP: refused, and tested in test_roads.py"
ONE_ADAPTER = "one adapter with experts serves a batch: refused, and tested in test_refusals.py"
PROMPTS = "for prompt learning methods"
DOES_NOT_APPLY: dict[str, str] = {
    "merge_layers": MERGING,
    "merge_layers_fp16": MERGING,
    "merge_layers_is_idempotent": MERGING,
    "merge_layers_multi": MERGING,
    "merge_layers_nan": MERGING,
    "safe_merge": MERGING,
    "mixed_adapter_batches": ONE_ADAPTER,
    "generate_with_mixed_adapter_batches_and_beam_search": ONE_ADAPTER,
    "training_prompt_learning_tasks": PROMPTS,
    "weighted_combination_of_adapters": "for LoRA and IA3; ours is refused, and tested in test_refusals.py",
    "weighted_combination_of_adapters_lora": "for LoRA",
    "weighted_combination_of_adapters_ia3": "for IA3",
    "adding_multiple_adapters_with_bias_raises": "for configurations with `bias`",
    "add_adapter_no_autocast_adapter_dtype": "wants every adapter tensor in a 16-bit base's dtype; routers are fp32",
    "from_pretrained_config_construction": "wants the very configuration object; ours is copied, for it is filled in",
    "lora_conversion": "for methods that are a low-rank change of one matrix",
}
"""Part of the contract -> why it says nothing about this method."""

NAMES_NONE = "calls the model with inputs of its own, which name no language: refused, and tested in test_language.py"
DOES_NOT_APPLY_BY_LANGUAGE: dict[str, str] = {
    "disable_adapter": "calls the bare base model with the adapter's arguments, of which it knows no `language_ids`",
    "generate_half_prec": NAMES_NONE,
    "generate_pos_args": NAMES_NONE,
    "passing_input_embeds_works": NAMES_NONE,
}
"""The same for routing by language, beside those."""

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "save_pretrained": [{"safe_serialization": safe} for safe in (True, False)],
    "save_pretrained_selected_adapters": [{"safe_serialization": safe} for safe in (True, False)],
    "generate_pos_args": [{"raises_err": False}],
    "training_gradient_checkpointing": [{"use_reentrant": False}],
}
"""Part of the contract -> the arguments it is run with, where there are any."""


def load_contract() -> Any:
    """PEFT's base class for tests; None where its sources have not been fetched."""
    if not (SOURCES / "tests" / "testing_common.py").is_file():
        return None
    if importlib.util.find_spec("diffusers") is None:  # imported for tests of image models
        sys.modules["diffusers"] = types.ModuleType("diffusers")
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    package = types.ModuleType("peft_contract")
    package.__path__ = [str(SOURCES / "tests")]
    sys.modules["peft_contract"] = package
    return importlib.import_module("peft_contract.testing_common").PeftCommonTester


Contract = load_contract()
CONTRACT = sorted(name.removeprefix("_test_") for name in dir(Contract or object) if name.startswith("_test_"))
CASES = [(name, arguments) for name in CONTRACT for arguments in ARGUMENTS.get(name, [{}])]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(Contract is None, reason="PEFT's sources are not there: make test-peft-contract fetches them"),
]


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    """Family -> folder of a pico model, whose name tells PEFT's tests what kind it is."""
    folders = {family: tmp_path_factory.mktemp("contract") / f"tiny-random-{family}" for family in FAMILIES}
    for family, folder in folders.items():
        # It compares two passes in training, and which expert has tokens must not depend on what GPT-2 drops.
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if family == "gpt2" else {}
        pico(family, **dropout).save_pretrained(folder)
    return {family: str(folder) for family, folder in folders.items()}


def contract_for(by_language: bool) -> Any:
    class Tested(Contract):
        transformers_class = AutoModelForCausalLM

        def prepare_inputs_for_testing(self):
            inputs = {
                "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
                "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
            }
            return inputs | ({"language_ids": torch.tensor([0, 3])} if by_language else {})

        def perturb_trainable_token_weights_if_used(self, model, *args, **kwargs):
            """Called where an adapter must make a difference, which untrained experts do not."""
            randomise_experts(model)

    return Tested()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{name} {a or ''}".strip() for name, a in CASES])
def test_contract(name, arguments, family, kind, bases):
    fields = moe_config(**KINDS[kind])
    by_language = fields.routing == "language"
    left_out = DOES_NOT_APPLY | (DOES_NOT_APPLY_BY_LANGUAGE if by_language else {})
    if name in left_out:
        pytest.skip(f"does not apply: {left_out[name]}")
    kwargs = {field: getattr(fields, field) for field in ("languages", "experts", "routing", "expert_rank")}
    tested = contract_for(by_language)
    method = getattr(tested, f"_test_{name}")
    given = {
        "model_id": bases[family],
        "config_cls": MoeDeltaConfig,
        "config_kwargs": {**kwargs, "task_type": "CAUSAL_LM"},
    }
    known = inspect.signature(method).parameters
    if "test_name" in known:
        given["test_name"] = ""
    method(**given, **arguments)


def test_what_does_not_apply_is_part_of_the_contract():
    assert set(DOES_NOT_APPLY) | set(DOES_NOT_APPLY_BY_LANGUAGE) | set(ARGUMENTS) <= set(CONTRACT)
