"""Do new tokens pay? SmolLM2 learns Greek with and without them: fertility, bits per byte, and what must not change.

    python examples/demo_inputs.py --output inputs
    python tests/benchmarks/bench_vocabulary.py --inputs inputs

Both arms train one Greek expert on the same documents in the same order, in batches of as many tokens. A new token
carries more text, so the arm with them has read as many bytes as the other one earlier ("same bytes") and more of them
after as many steps ("same steps").
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from measure import print_table  # before torch: it sets how threads wait

import torch  # isort: skip
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_moe_delta import MoeDeltaConfig, extend_vocabulary, propose_tokens
from peft_moe_delta.evaluation import bits_per_byte, fertility

ROWS, LENGTH = 8, 128
EXPERT_RATE = 4e-4
"""The experts' learning rate; new rows, which have further to go from their mean, have one of their own."""


def read(inputs: Path, name: str, limit: int | None = None) -> list[str]:
    """Documents of a text file, whole ones up to a number of bytes."""
    texts: list[str] = []
    for line in (inputs / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        if limit is not None and sum(len(text.encode()) for text in texts) >= limit:
            break
        texts.append(json.loads(line)["text"])
    return texts


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
) -> float:
    """Expand on Greek for some steps; the seconds they took."""
    rows = [p for name, p in model.named_parameters() if p.requires_grad and "moe_delta_rows" in name]
    experts = [p for name, p in model.named_parameters() if p.requires_grad and "moe_delta_rows" not in name]
    groups = [{"params": experts, "lr": EXPERT_RATE}, {"params": rows, "lr": token_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    seconds = 0.0
    for step in range(1, steps + 1):
        model.train()
        start = time.perf_counter()
        ids = stream.batch()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids, language="el").loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        after(step)
    model.eval()
    return seconds


def score(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    with torch.autocast("cpu", torch.bfloat16):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, required=True, help="what examples/demo_inputs.py wrote")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1000, help="how many new tokens")
    parser.add_argument("--token-rate", type=float, default=2e-3, help="learning rate of the new rows")
    parser.add_argument("--test-bytes", type=int, default=30_000)
    arguments = parser.parse_args()
    inputs, steps = arguments.inputs, arguments.steps
    texts, test = read(inputs, "el.train"), read(inputs, "el.test", arguments.test_bytes)
    english = read(inputs, "en.train")
    random.Random(0).shuffle(texts)

    plain = AutoTokenizer.from_pretrained(inputs / "model")
    start = time.perf_counter()
    tokens = propose_tokens(texts, plain, arguments.tokens, original_texts=english)
    print(f"{len(tokens)} tokens proposed in {time.perf_counter() - start:.1f} s")
    model = upcycled(inputs)
    untrained = score(model, plain, test)
    plain_stream = Stream(texts, plain)
    plain_seconds = train(model, plain_stream, steps, arguments.token_rate)
    rows: list[list[object]] = [
        ["before training", 0, 0, "", f"{untrained:.3f}"],
        ["old tokens", steps, plain_stream.bytes, f"{plain_seconds:.0f}", f"{score(model, plain, test):.3f}"],
    ]

    model, grown = upcycled(inputs), AutoTokenizer.from_pretrained(inputs / "model")
    extend_vocabulary(model, grown, tokens)
    rows.append(["new tokens, before training", 0, 0, "", f"{score(model, grown, test):.3f}"])
    stream = Stream(texts, grown)
    same_bytes: list[list[object]] = []
    started = time.perf_counter()

    def after(step: int) -> None:
        if not same_bytes and stream.bytes >= plain_stream.bytes:
            seconds = time.perf_counter() - started
            bits = score(model.eval(), grown, test)
            same_bytes.append(["new tokens, same bytes", step, stream.bytes, f"{seconds:.0f}", f"{bits:.3f}"])

    seconds = train(model, stream, steps, arguments.token_rate, after)
    rows += same_bytes
    rows.append(["new tokens, same steps", steps, stream.bytes, f"{seconds:.0f}", f"{score(model, grown, test):.3f}"])
    held_out_english = read(inputs, "en.test")
    changed = sum(grown(text)["input_ids"] != plain(text)["input_ids"] for text in held_out_english)
    counts = [fertility(test, plain), fertility(test, grown)]
    counts += [fertility(held_out_english, plain), fertility(held_out_english, grown)]
    print_table(
        f"tokenizer, {len(tokens)} new tokens; {changed} of {len(held_out_english)} English test documents are cut "
        "otherwise",
        ["held-out text", "tokens a word", "bytes a token"],
        [
            [name, f"{count.tokens_per_word:.2f}", f"{count.bytes_per_token:.2f}"]
            for name, count in zip(("Greek, old", "Greek, new", "English, old", "English, new"), counts, strict=True)
        ],
    )
    print_table(
        f"one Greek expert, steps of {ROWS} x {LENGTH} tokens", ["", "steps", "bytes read", "s", "bits per byte"], rows
    )
    print_table("after the graft", ["", "largest difference"], check_graft(model, inputs, held_out_english))


if __name__ == "__main__":
    main()
