"""Run as a script: load a checkpoint with plain transformers, where `peft_moe_delta` cannot be imported.

In: a checkpoint folder, a file to write, and any word where the folder's modelling file, just written, is to be used.
Out: that file, with token ids, their logits and the architecture's name.
"""

import sys

sys.modules["peft_moe_delta"] = None  # type: ignore[assignment]  # any import of it now fails

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main(folder: str, proof: str, own_code: str = "") -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=bool(own_code)).eval()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (2, 16), generator=generator)
    with torch.inference_mode():
        logits = model(input_ids=input_ids).logits.float()
    tensors = {"input_ids": input_ids, "logits": logits.contiguous()}
    save_file(tensors, proof, metadata={"architecture": type(model).__name__})


if __name__ == "__main__":
    main(*sys.argv[1:])
