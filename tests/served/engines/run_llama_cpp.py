"""`python run_llama_cpp.py ASKED FOUND`: log-probabilities and greedy tokens of each export, in llama.cpp.

Beside this package, whose converter's driver and client it uses: what `peft-moe-delta gguf` does is what is measured.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import common

from peft_moe_delta.served.client import Server
from peft_moe_delta.served.convert import PACKAGE, VERSION, convert
from peft_moe_delta.served.gguf import serving


def answers(folder, prompts, max_tokens):
    """What llama.cpp says of each prompt of an export in f32."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "model.gguf")
        convert(Path(folder), file, outtype="f32", name="model", source=common.option("source"), pre_tokenizer="gpt-2")
        with serving(file, 512) as (url, _):
            server = Server(url)
            for prompt in prompts:
                yield list(server.prompt_logprobs(prompt)), list(server.complete(prompt, max_tokens).ids or ())


common.run(answers, f"xllamacpp {version('xllamacpp')}, in f32 by the converter of {PACKAGE} {VERSION}")
