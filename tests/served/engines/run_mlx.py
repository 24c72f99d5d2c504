"""`python run_mlx.py ASKED FOUND`, in the environment of mlx-lm: log-probabilities and greedy tokens of each export."""

from importlib.metadata import version
from pathlib import Path

import common
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def answers(folder, prompts, max_tokens):
    """What MLX says of each prompt, and how it goes on by its cache."""
    model = load_model(Path(folder))[0]
    for prompt in prompts:
        cache = make_prompt_cache(model)
        logits = model(mx.array([prompt]), cache=cache)[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        rows = [logprobs[place, token].item() for place, token in enumerate(prompt[1:])]
        written = [mx.argmax(logits[-1]).item()]
        while len(written) < max_tokens:
            written.append(mx.argmax(model(mx.array([written[-1:]]), cache=cache)[0, -1]).item())
        yield rows, written


mx.set_default_device(mx.cpu)
common.run(answers, f"mlx-lm {version('mlx-lm')} with mlx {version('mlx')} on a CPU")
