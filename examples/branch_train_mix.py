"""Branch, train, mix: one dense model a language, each trained on its own, then one mixture of them all.

    python examples/demo_inputs.py --output build/demo/inputs      # a real model, real text (pip only)
    python examples/branch_train_mix.py                            # every branch in a process of its own

Branches never talk to each other. On several machines, run one a machine, and mix where all their folders are:

    python examples/branch_train_mix.py --only hu                  # and --only el elsewhere
    python examples/branch_train_mix.py

Run it again after an interruption: finished branches are kept, the others go on from their last checkpoint.

Cost: a full fine-tuning for each language. Mixing reads each branch once, one tensor at a time.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from peft_moe_delta import fit_routers, mix
from peft_moe_delta.checkpoint import whole_folder
from peft_moe_delta.evaluation import bits_per_byte
from quickstart import load, read


def train_branch(seed: Path, text: Path, code: str, output: Path, steps: int) -> Path:
    """The seed, continued on one language with the plain Trainer; every weight trains. Gives the branch's folder."""
    branch, work = output / f"branch-{code}", output / f"work-{code}"
    if branch.exists():
        return branch  # it appears only when it is whole
    tokenizer = AutoTokenizer.from_pretrained(seed)
    dataset = []
    for document in read(text / f"{code}.train.jsonl", "text"):
        ids = tokenizer(document, truncation=True, max_length=128)["input_ids"]
        dataset.append({"input_ids": ids, "labels": list(ids)})
    model = load(seed)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        logging_steps=10,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_steps=max(1, steps // 4),
        save_total_limit=2,
        report_to=[],
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.exists() else None)
    with whole_folder(branch) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return branch


def train_all(arguments: list[str], codes: list[str]) -> None:
    """Every branch in its own process, all at once."""
    processes = [subprocess.Popen([sys.executable, __file__, *arguments, "--only", code]) for code in codes]
    if any([process.wait() for process in processes]):  # a list: every process is waited for
        sys.exit("A branch failed; its messages are above. Run this again to go on where it stopped.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=Path("build/demo/inputs"), help="made by demo_inputs.py")
    parser.add_argument("--output", type=Path, default=Path("build/branch_train_mix"))
    parser.add_argument("--languages", nargs="+", default=["hu", "el"], help="one branch each")
    parser.add_argument("--steps", type=int, default=40, help="of each branch")
    parser.add_argument("--attention-experts", choices=("shared_kv", "full"), help="mix attention, too (BAM)")
    parser.add_argument("--only", help="train this branch, and stop")
    chosen = parser.parse_args()
    seed, text = chosen.inputs / "model", chosen.inputs / "text"
    if chosen.only:
        train_branch(seed, text, chosen.only, chosen.output, chosen.steps)
        return
    missing = [code for code in chosen.languages if not (chosen.output / f"branch-{code}").exists()]
    train_all(sys.argv[1:], missing)

    # Mix: every branch's MLPs become experts, beside the seed's own; all other weights are averaged into a new base.
    model = mix(
        seed,
        {code: chosen.output / f"branch-{code}" for code in chosen.languages},  # group -> checkpoint
        {"en": "original", **{code: code for code in chosen.languages}},  # language -> group
        others="average",
        base_output=chosen.output / "base",
        attention_experts=chosen.attention_experts,
    )
    tokenizer = AutoTokenizer.from_pretrained(seed)
    codes = ["en", *chosen.languages]
    fit_routers(model, {code: read(text / f"{code}.train.jsonl", "text")[:100] for code in codes}, tokenizer)
    model.save_pretrained(chosen.output / "mixture")  # from here, train it as any other adapter
    for code in codes:
        held_out = read(text / f"{code}.validation.jsonl", "text")
        scores = [bits_per_byte(m, tokenizer, held_out).value for m in (load(seed), model)]
        print(f"{code} bits per byte: seed {scores[0]:.3f}, mixture {scores[1]:.3f}")


if __name__ == "__main__":
    main()
