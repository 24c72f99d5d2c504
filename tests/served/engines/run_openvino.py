"""`python run_openvino.py ASKED FOUND`: log-probabilities and greedy tokens of each export, compiled by OpenVINO.

OpenVINO converts the PyTorch model that transformers loads, so it runs beside this package's own torch.
"""

from importlib.metadata import version

import common
import openvino
import torch
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """A causal model without a cache, as a function of token ids."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def answers(folder, prompts, max_tokens):
    """What OpenVINO says of each prompt; each new token by a pass over all before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # no loop over the experts that some tokens happen to choose
    length = torch.export.Dim("length", min=2, max=256)
    with torch.no_grad():
        program = torch.export.export(
            Logits(model), (torch.tensor([prompts[0]]),), dynamic_shapes={"input_ids": {1: length}}
        )
    compiled = openvino.compile_model(
        openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    for prompt in prompts:
        ids = list(prompt)
        logprobs = torch.from_numpy(compiled(torch.tensor([ids]).numpy())[0][0]).log_softmax(-1)
        rows = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        while len(ids) < len(prompt) + max_tokens:
            ids.append(int(compiled(torch.tensor([ids]).numpy())[0][0, -1].argmax()))
        yield rows, ids[len(prompt) :]


common.run(answers, f"OpenVINO {version('openvino')} on a CPU")
