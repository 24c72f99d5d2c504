"""A chat model learns to chat in another language, with TRL's SFTTrainer. English answers stay as they are.

    python examples/chat_trl.py --model Qwen/Qwen3-0.6B --conversations hungarian.jsonl     # pip install trl

Each line of the file has a `prompt` and a `completion`, both lists of messages as TRL takes them:

    {"prompt": [{"role": "user", "content": "Szia!"}], "completion": [{"role": "assistant", "content": "Szia!"}]}

The experts lie over the chat model itself here, so there is nothing to graft. Where you have plain text and no
conversations, train over the base model and graft: `quickstart.py`.

Cost: low-rank experts train a small share of the weights, so a model takes little more than it does in evaluation, plus
the activations of a batch. A step takes about as long as one of LoRA on the MLPs.
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_moe_delta import AuxiliaryLossMixin, LanguageCollator, MoeDeltaConfig


class LanguageSFTTrainer(AuxiliaryLossMixin, SFTTrainer):
    """SFTTrainer makes its own loss and drops the language of a row. The mixin adds the routers' part and keeps it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model: folder or Hub id")
    parser.add_argument("--conversations", required=True, help="a .jsonl file")
    parser.add_argument("--language", default="hu", help="of the conversations")
    parser.add_argument("--output", default="build/chat")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--question", default="Mi Magyarország fővárosa?", help="asked at the end, in that language")
    chosen = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(chosen.model),
        MoeDeltaConfig(
            languages={"en": "original", chosen.language: "new"},
            experts={"new": 1},
            expert_rank=chosen.rank,
            routing="language",
            top_k=1,
        ),
    )
    conversations = load_dataset("json", data_files=chosen.conversations, split="train")
    conversations = conversations.map(lambda row: {"language": chosen.language})
    arguments = SFTConfig(
        chosen.output,
        max_steps=chosen.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
    )
    LanguageSFTTrainer(
        model,
        arguments,
        train_dataset=conversations,
        processing_class=tokenizer,
        data_collator=LanguageCollator(tokenizer, model, max_length=1024),
    ).train()
    model.save_pretrained(chosen.output)
    tokenizer.save_pretrained(chosen.output)

    asked = [{"role": "user", "content": chosen.question}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.eval().generate(**prompt.to(model.device), language=chosen.language, max_new_tokens=64)
    print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
