"""Asks a running `peft-moe-delta serve` in several languages, and prints the answers as they are written.

    peft-moe-delta serve my-adapter --name hu-el &                     # pip install "peft-moe-delta[serve]"
    python examples/ask_server.py hu="Mi Magyarország fővárosa?" el="Ποια είναι η πρωτεύουσα της Ελλάδας;"

Any OpenAI client does the same; `language` is the one field that theirs do not have. Leave the code out (`="..."`) for
a stock export, which needs no language.

Cost: the server holds one copy of the model with all its experts. A token runs through as many experts as `top_k` says,
so an answer takes about as long as the dense model's; requests that wait are answered together, in whatever languages.
"""

import argparse
import json
from collections.abc import Iterator

import requests


def answer(url: str, question: str, language: str | None, max_tokens: int) -> Iterator[str]:
    """The parts of an answer, as they come."""
    [model, *_] = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
    request = {
        "model": model["id"],
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    if language:
        request["language"] = language
    with requests.post(f"{url}/v1/chat/completions", json=request, stream=True, timeout=600) as response:
        if not response.ok:
            raise SystemExit(response.text)
        for line in response.iter_lines():
            event = line.decode().removeprefix("data: ")
            if event and event != "[DONE]":
                yield from (choice["delta"].get("content") or "" for choice in json.loads(event)["choices"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", metavar="CODE=QUESTION")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=64)
    chosen = parser.parse_args()
    for given in chosen.questions:
        language, _, question = given.partition("=")
        print(f"{language or 'no language'}: ", end="")
        for part in answer(chosen.url, question, language, chosen.max_tokens):
            print(part, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
