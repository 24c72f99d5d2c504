"""Do new tokens pay? SmolLM2 learns Greek with and without them: fertility, bits per byte, and what must not change.

    python examples/demo_inputs.py --output build/demo/inputs
    python tests/benchmarks/bench_vocabulary.py

Both arms train one Greek expert on the same documents in the same order, in batches of as many tokens. The rows of the
new tokens are first distilled and fitted on documents that training reads first; the table says what that takes. A new
token carries more text, so the arm with them has read as many bytes as the other one earlier ("same bytes") and more of
them after as many steps.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from measure import conditions, keep_memory, print_table  # before torch: it sets how threads wait

import torch  # isort: skip
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_moe_delta import MoeDeltaConfig, extend_vocabulary, propose_tokens
from peft_moe_delta.evaluation import bits_per_byte, fertility
from peft_moe_delta.recipe.stages import settled_precision

ROWS, LENGTH = 8, 128
EXPERT_RATE = 4e-4
"""The experts' learning rate; new rows, which belong to tokens and not to layers, have one of their own."""


def arithmetic() -> torch.autocast:
    """bf16 where the machine is faster in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=settled_precision("auto") == "bf16")


def read(inputs: Path, name: str, limit: int | None = None) -> list[str]:
    """Documents of a text file, whole ones up to a number of bytes."""
    texts: list[str] = []
    for line in (inputs / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        if limit is not None and sum(len(text.encode()) for text in texts) >= limit:
            break
        texts.append(json.loads(line)["text"])
    return texts


def beginning(texts: list[str], limit: int) -> list[str]:
    """The first documents, whole ones up to a number of bytes."""
    sizes = accumulate(len(text.encode()) for text in texts)
    return [text for text, size in zip(texts, sizes, strict=True) if size <= limit]


@dataclass
class Stream:
    """Documents as batches of `ROWS` x `LENGTH` tokens, in order, counting the bytes read."""

    texts: list[str]
    tokenizer: PreTrainedTokenizerBase
    _bytes: int = 0
    _next: int = 0
    _tokens: list[int] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of the text in the batches so far."""
        return self._bytes - len(self.tokenizer.decode(self._tokens).encode())

    def batch(self) -> torch.Tensor:
        while len(self._tokens) < ROWS * LENGTH:
            text = self.texts[self._next % len(self.texts)]
            self._next += 1
            self._bytes += len(text.encode())
            self._tokens += [*self.tokenizer(text, verbose=False)["input_ids"], self.tokenizer.eos_token_id]
        taken, self._tokens = self._tokens[: ROWS * LENGTH], self._tokens[ROWS * LENGTH :]
        return torch.tensor(taken).view(ROWS, LENGTH)


def upcycled(inputs: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    languages = {"en": "original", "el": "greek"}
    return get_peft_model(base, MoeDeltaConfig(languages=languages, experts={"greek": 1}, routing="language"))


def train(
    model: PeftModel, stream: Stream, steps: int, token_rate: float, after: Callable[[int], None] = lambda step: None
) -> None:
    """Expand on Greek for some steps."""
    rows = [p for name, p in model.named_parameters() if p.requires_grad and "moe_delta_rows" in name]
    experts = [p for name, p in model.named_parameters() if p.requires_grad and "moe_delta_rows" not in name]
    groups = [{"params": experts, "lr": EXPERT_RATE}, {"params": rows, "lr": token_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    for step in range(1, steps + 1):
        model.train()
        ids = stream.batch()
        with arithmetic():
            model(input_ids=ids, labels=ids, language="el").loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after(step)
    model.eval()


def score(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    with arithmetic():
        return bits_per_byte(model, tokenizer, texts, language="el").value


@torch.no_grad()
def check_graft(model: PeftModel, inputs: Path, texts: list[str]) -> list[list[object]]:
    """Graft onto a post-trained stand-in that has two special tokens more, and compare what must be equal."""
    post = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    generator = torch.Generator().manual_seed(0)
    for parameter in post.parameters():
        parameter += 0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|result|>"]})
    post.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    old = len(tokenizer)
    ids = torch.tensor([tokenizer("\n".join(texts), verbose=False)["input_ids"][:256]])
    with tempfile.TemporaryDirectory() as folder:
        post.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        expected, table = post(input_ids=ids).logits, post.get_input_embeddings().weight.detach().clone()
        grafted = model.graft(folder).eval()
    found = grafted(input_ids=ids, language="en").logits
    new = model.get_input_embeddings().moe_delta_rows["default"].weight
    stock = grafted.get_input_embeddings().grown_weight("default")
    rows = [
        ("English logits of the post-trained model's tokens", (found[..., :old] - expected).abs().max().item()),
        ("rows of the post-trained model's tokens, special ones included", (stock[:old] - table).abs().max().item()),
        ("rows of new tokens, against those that were trained", (stock[old:] - new).abs().max().item()),
    ]
    return [[name, f"{difference:.1e}" if difference else "0, bit for bit"] for name, difference in rows]


def curve(
    model: PeftModel,
    stream: Stream,
    test: list[str],
    arguments: argparse.Namespace,
    milestones: list[int],
    head: int = 0,
) -> list[list[object]]:
    """Train one arm, scored at some steps and where it has read `head` bytes: arm, steps, bytes, seconds, bits."""
    name = "old tokens" if not head else "new tokens"
    start, scoring, rows, waiting = time.perf_counter(), 0.0, [], head

    def after(step: int) -> None:
        nonlocal scoring, waiting
        same_bytes = bool(waiting) and stream.bytes >= waiting
        if step not in milestones and not same_bytes:
            return
        waiting = 0 if same_bytes else waiting
        before = time.perf_counter()
        bits = score(model.eval(), stream.tokenizer, test)
        scored = [f"{name}, same bytes" if same_bytes else name, step, stream.bytes, round(before - start - scoring)]
        rows.append([*scored, round(bits, 4)])
        scoring += time.perf_counter() - before
        print(rows[-1], flush=True)

    train(model, stream, arguments.steps, arguments.token_rate, after)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", type=Path, default=Path("build/demo/inputs"), help="what examples/demo_inputs.py wrote"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400, help="how many new tokens")
    parser.add_argument("--fit-bytes", type=int, default=160_000, help="text that the rows are fitted to; 0 for none")
    parser.add_argument("--token-rate", type=float, default=1e-3, help="learning rate of the new rows")
    parser.add_argument("--test-bytes", type=int, default=15_000)
    arguments = parser.parse_args()
    if not (arguments.inputs / "text").is_dir():
        print(
            f"skipped: no text in {arguments.inputs}; make it with examples/demo_inputs.py --output build/demo/inputs"
        )
        return
    keep_memory()
    inputs, steps = arguments.inputs, arguments.steps
    texts, test = read(inputs, "el.train"), read(inputs, "el.validation", arguments.test_bytes)
    english = read(inputs, "en.train")
    random.Random(0).shuffle(texts)
    milestones = sorted({min(12, steps), min(24, steps), steps})

    plain = AutoTokenizer.from_pretrained(inputs / "model")
    start = time.perf_counter()
    tokens = propose_tokens(texts, plain, arguments.tokens, original_texts=english)
    print(f"{len(tokens)} tokens proposed in {time.perf_counter() - start:.1f} s", flush=True)

    model, grown = upcycled(inputs), AutoTokenizer.from_pretrained(inputs / "model")
    untrained = score(model, plain, test)
    extend_vocabulary(model, grown, tokens)
    rows: list[list[object]] = [
        ["old tokens, untrained", 0, 0, 0, round(untrained, 4)],
        ["new tokens, mean of their pieces", 0, 0, 0, round(score(model, grown, test), 4)],
    ]
    if arguments.fit_bytes:
        # The same documents that training reads first, so neither arm sees text that the other does not.
        head = beginning(texts, arguments.fit_bytes)
        model, grown = upcycled(inputs), AutoTokenizer.from_pretrained(inputs / "model")
        start = time.perf_counter()
        with arithmetic():
            extend_vocabulary(model, grown, tokens, texts=head, language="el")
        seconds = time.perf_counter() - start
        read_bytes = sum(len(text.encode()) for text in head)
        rows.append(["new tokens, fitted", 0, read_bytes, round(seconds), round(score(model, grown, test), 4)])
    for row in rows:
        print(row, flush=True)

    plain_stream, stream = Stream(texts, plain), Stream(texts, grown)
    rows += curve(upcycled(inputs), plain_stream, test, arguments, milestones)
    rows += curve(model, stream, test, arguments, milestones, head=plain_stream.bytes)
    held_out_english = read(inputs, "en.test")
    changed = sum(grown(text)["input_ids"] != plain(text)["input_ids"] for text in held_out_english)
    counts = [fertility(texts, tokenizer) for texts in (test, held_out_english) for tokenizer in (plain, grown)]
    cut = [
        [name, round(count.tokens_per_word, 2), round(count.bytes_per_token, 2)]
        for name, count in zip(("Greek, old", "Greek, new", "English, old", "English, new"), counts, strict=True)
    ]
    grafted = check_graft(model, inputs, held_out_english)
    tables = {
        f"tokenizer, {len(tokens)} new tokens; {changed} of {len(held_out_english)} English test documents are cut "
        "otherwise": (["held-out text", "tokens a word", "bytes a token"], cut),
        f"one Greek expert, steps of {ROWS} x {LENGTH} tokens": (
            ["", "steps", "bytes read", "s", "bits per byte"],
            rows,
        ),
        "after the graft": (["", "largest difference"], grafted),
    }
    for title, (header, body) in tables.items():
        print_table(title, header, body)
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("inputs", "output")}
        result = {"conditions": conditions(), "settings": settings}
        result["tables"] = {title: [header, *body] for title, (header, body) in tables.items()}
        arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
