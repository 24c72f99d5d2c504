"""Expansion on more text than fits the disk: languages are streamed, drawn with a temperature, and end at a budget.

    TEXT="--text hu=hf://HuggingFaceFW/fineweb-2:hun_Latn --text el=hf://HuggingFaceFW/fineweb-2:ell_Grek"
    python examples/streaming.py $TEXT
    torchrun --nproc_per_node 2 examples/streaming.py $TEXT     # two GPUs, the whole model on each; or a share:
    accelerate launch --config_file examples/fsdp2.yaml --num_processes 2 examples/streaming.py $TEXT

A text is a .jsonl file with `text`, or `hf://OWNER/NAME:CONFIG`. Nothing in the script knows how many GPUs there are.

Cost: full experts take what full fine-tuning of the MLPs takes, once for each language; `--rank 16` takes a fraction.
`peft-moe-delta plan RECIPE --gpus 2` says whether it fits. Two GPUs read twice the text in a step. The network is read
once, and again from the beginning for a budget that is resumed.
"""

import argparse

import torch
from datasets import IterableDataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_moe_delta import LanguageCollator, MoeDeltaConfig, RoutingCallback
from peft_moe_delta.streams import first_tokens, interleave_languages


def stream(source: str) -> IterableDataset:
    """Documents with `text` alone, in an order that is mixed a little as they come."""
    name, _, config = source.removeprefix("hf://").partition(":")
    if source.startswith("hf://"):
        documents = load_dataset(name, config or None, split="train", streaming=True)
    else:
        documents = load_dataset("json", data_files=source, split="train", streaming=True)
    return documents.select_columns("text").shuffle(seed=0, buffer_size=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B-Base", help="a base model: folder or Hub id")
    parser.add_argument("--text", action="append", required=True, metavar="CODE=SOURCE", help="once a language")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="most tokens of a language")
    parser.add_argument(
        "--temperature", type=float, default=2.0, help="1: as much as there is; more: small ones more often"
    )
    parser.add_argument(
        "--size", action="append", default=[], metavar="CODE=NUMBER", help="how much there is, in any unit"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rank", type=int, help="of low-rank experts; full ones without it")
    parser.add_argument("--output", default="build/streaming")
    chosen = parser.parse_args()

    sources = dict(text.split("=", 1) for text in chosen.text)
    sizes = {code: float(number) for code, number in (size.split("=", 1) for size in chosen.size)}
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chosen.model),
        MoeDeltaConfig(
            languages={"en": "original", **{code: code for code in sources}},
            experts=dict.fromkeys(sources, 1),
            expert_rank=chosen.rank,
            routing="language",
            top_k=1,
        ),
    )
    documents = interleave_languages(
        {code: first_tokens(stream(source), chosen.tokens, tokenizer) for code, source in sources.items()},
        temperature=chosen.temperature,
        sizes=sizes or dict.fromkeys(sources, 1),  # a stream does not know its size
    )
    arguments = TrainingArguments(
        chosen.output,
        max_steps=chosen.steps,  # a stream has no length that epochs could be counted in
        per_device_train_batch_size=8,
        learning_rate=5e-5,
        bf16=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},  # each process reads for itself
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
    )
    collator = LanguageCollator(tokenizer, model, max_length=chosen.max_length)
    trainer = Trainer(model, arguments, train_dataset=documents, data_collator=collator, callbacks=[RoutingCallback()])
    trainer.train()
    model.save_pretrained(
        chosen.output, is_main_process=trainer.is_world_process_zero()
    )  # on every process: it gathers


if __name__ == "__main__":
    main()
