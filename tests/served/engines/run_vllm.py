"""`python run_vllm.py ASKED FOUND`, in vLLM's own environment: log-probabilities and greedy tokens of each export."""

import gc
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
import common
import vllm
from vllm import LLM, SamplingParams


def answers(folder, prompts, max_tokens):
    """What vLLM says of each prompt."""
    llm = LLM(
        model=folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256,
        trust_remote_code=True, max_num_seqs=4, disable_log_stats=True,
    )  # fmt: skip
    asked = SamplingParams(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=1, ignore_eos=True, detokenize=False)
    for prompt, out in zip(
        prompts, llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False), strict=True
    ):
        rows = [row[token].logprob for row, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
        yield rows, list(out.outputs[0].token_ids)
    del llm
    gc.collect()


common.run(answers, f"vLLM {vllm.__version__} on a CPU")
