"""Run as a script: use remote-code folders with plain transformers, where `peft_moe_delta` cannot be imported.

In: folders. Out: in each a file `proof.safetensors` with the logits of `input_ids` and what the model generates.
"""

import sys

sys.modules["peft_moe_delta"] = None  # any import of it now fails

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402


def main(*folders):
    for folder in folders:
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError):
            pass
        else:
            raise AssertionError("loaded without the modelling file, so as something else")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        batch = load_file(f"{folder}/batch.safetensors")
        with torch.no_grad():
            proof = {"logits": model(**batch).logits}
            mask = torch.ones_like(batch["input_ids"])
            mask[0, :2] = mask[1, :4] = 0
            proof["padded"] = model(**batch, attention_mask=mask).logits
            greedy = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
            greedy |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
            proof["cached"] = model.generate(**greedy)
            proof["uncached"] = model.generate(**greedy, use_cache=False)
            proof["beams"] = model.generate(**greedy, num_beams=2)
            if "AutoModel" in model.config.auto_map:
                decoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
                proof["decoder"] = decoder(**batch).last_hidden_state
                proof["own decoder"] = model.base_model(**batch).last_hidden_state
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        router = next(parameter for name, parameter in model.named_parameters() if "router" in name)
        expert = next(parameter for name, parameter in model.named_parameters() if "experts.1." in name)
        proof["gradients"] = torch.stack([router.grad.abs().sum().float(), expert.grad.abs().sum().float()])
        proof["without_gradient"] = torch.tensor(
            [p.grad is None for name, p in model.named_parameters() if "classifier" not in name]
        )
        proof["router"] = router.detach()
        model.eval()
        model.save_pretrained(f"{folder}/again")
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", trust_remote_code=True).eval()
        with torch.no_grad():
            proof["again"] = again(**batch).logits
        save_file({name: tensor.contiguous() for name, tensor in proof.items()}, f"{folder}/proof.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
