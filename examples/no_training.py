"""A multilingual instruct model without a gradient step: others' language models, and one instruct model.

    python examples/no_training.py --seed base --post-trained instruct --branch hu=hungarian --branch el=greek

All are checkpoints of one architecture and tokenizer, trained from one base model: Hub ids or folders. `mix` takes the
language models' MLPs as experts, `fit_routers` solves for the routers on some text of each language, `merge_and_graft`
adds what post-training changed. The result is a stock MoE checkpoint.

Where no branches or instruct model are named, small ones are trained first, which is the part you would skip:

    python examples/demo_inputs.py --output build/demo/inputs      # a real model, real text (pip only)
    python examples/no_training.py

Cost: no training where all models are named: one pass over some text for the routers, and each branch read once.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from branch_train_mix import train_branch
from peft_moe_delta import fit_routers, mix
from peft_moe_delta.evaluation import bits_per_byte, encode_task
from quickstart import load, read, train


def tuned(seed: Path, tasks: Path, output: Path, steps: int) -> Path:
    """A stand-in for an instruct model: the seed, tuned on English tasks."""
    if not output.exists():
        tokenizer, model = AutoTokenizer.from_pretrained(seed), load(seed)
        encoded = [encode_task(tokenizer, t["prompt"], t["answer"]) for t in read(tasks, "")]
        dataset = [{"input_ids": ids, "labels": labels} for ids, labels in encoded]
        train(model, dataset, DataCollatorForSeq2Seq(tokenizer), steps, 3e-5, batch_size=16)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("build/demo/inputs"), help="made by demo_inputs.py")
    parser.add_argument("--output", type=Path, default=Path("build/no_training"))
    parser.add_argument("--seed", help="the base model all others come from; default: the inputs' model")
    parser.add_argument("--post-trained", help="an instruct model; default: one that is tuned here")
    parser.add_argument("--branch", action="append", default=[], metavar="CODE=CHECKPOINT", help="a language model")
    parser.add_argument("--steps", type=int, default=40, help="of the models that are trained here")
    chosen = parser.parse_args()
    text, seed = chosen.inputs / "text", chosen.seed or chosen.inputs / "model"

    # 0. What others have trained.
    post_trained = chosen.post_trained or tuned(
        seed, chosen.inputs / "tasks/train.jsonl", chosen.output / "tuned", chosen.steps
    )
    branches = dict(pair.split("=", 1) for pair in chosen.branch) or {
        code: train_branch(seed, text, code, chosen.output, chosen.steps) for code in ("hu", "el")
    }

    # 1. Mix: expert 0 is the seed's MLP, and each language model's is an expert of its own. One expert a token.
    languages = {"en": "original", **{code: code for code in branches}}  # language -> group
    model = mix(seed, branches, languages, top_k=1)

    # 2. Routers in closed form, from training text.
    tokenizer = AutoTokenizer.from_pretrained(seed)
    some = {code: read(text / f"{code}.train.jsonl", "text")[:100] for code in languages}
    fit_routers(model, some, tokenizer, max_length=128)

    # 3. Graft: what post-training changed goes onto every expert.
    chat = model.merge_and_graft(post_trained, expert_scale=0.5)
    chat.save_pretrained(chosen.output / "chat")
    AutoTokenizer.from_pretrained(post_trained).save_pretrained(chosen.output / "chat")

    chat, instruct = AutoModelForCausalLM.from_pretrained(chosen.output / "chat"), load(post_trained)
    for code in languages:
        held_out = read(text / f"{code}.validation.jsonl", "text")
        scores = [bits_per_byte(m, tokenizer, held_out).value for m in (instruct, model, chat)]
        print(f"{code} bits per byte: post-trained {scores[0]:.3f}, mixed {scores[1]:.3f}, grafted {scores[2]:.3f}")


if __name__ == "__main__":
    main()
