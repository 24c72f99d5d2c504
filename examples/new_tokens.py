"""New tokens for a language that the tokenizer spells letter by letter, before its experts are trained.

    python examples/new_tokens.py --language el --text greek.jsonl --original-text english.jsonl

Prints how many tokens a word takes before and after, trains experts and new rows together, and saves the adapter, which
loads over the base as it is. Graft it as any other: `peft-moe-delta graft`.

Cost: two rows of the embeddings for each new token. Choosing them reads the text once, and fitting the rows takes as
long as a few steps of training; in return a document has fewer tokens. At equal steps new tokens win, at equal bytes of
text they lost in our measurements: docs/benchmarks.md.
"""

import argparse
import json
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_moe_delta import LanguageCollator, MoeDeltaConfig, extend_vocabulary, propose_tokens
from peft_moe_delta.vocabulary import save_tokenizer


def read(path: str) -> list[str]:
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def tokens_per_word(texts: list[str], tokenizer) -> float:
    return sum(len(tokenizer(text)["input_ids"]) for text in texts) / sum(len(text.split()) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B-Base", help="a base model: folder or Hub id")
    parser.add_argument("--language", default="el")
    parser.add_argument("--text", required=True, help="a .jsonl file with `text`, in that language")
    parser.add_argument("--original-text", required=True, help="the same in a language that is to be cut as before")
    parser.add_argument("--tokens", type=int, default=400, help="how many new ones")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", default="build/new-tokens")
    chosen = parser.parse_args()

    texts, original = read(chosen.text), read(chosen.original_text)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chosen.model),
        MoeDeltaConfig(
            languages={"en": "original", chosen.language: "new"}, experts={"new": 1}, routing="language", top_k=1
        ),
    )
    before = tokens_per_word(texts, tokenizer)
    tokens = propose_tokens(texts, tokenizer, chosen.tokens, original_texts=original)
    extend_vocabulary(model, tokenizer, tokens, texts=texts[:50], language=chosen.language)
    print(
        f"tokens per word: {before:.2f} before, {tokens_per_word(texts, tokenizer):.2f} with {len(tokens)} new tokens"
    )

    arguments = TrainingArguments(
        chosen.output,
        max_steps=chosen.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-5,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
    )
    rows = [{"text": text, "language": chosen.language} for text in texts]
    collator = LanguageCollator(tokenizer, model, max_length=512)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(chosen.output)
    save_tokenizer(tokenizer, Path(chosen.output))  # its tokens are in the adapter, too


if __name__ == "__main__":
    main()
