"""Two roads, one number: every pair of ways to the same result, and the largest difference between them.

`PYTHONPATH=.:tests python tests/roads_table.py [FAMILY ...]` prints the table for every family that upcycles:

    bytes           tensors that differ between what is grafted in memory and from files; 0, or both refuse
    export          logits of the stand-alone model, stock or remote code, against the grafted adapter's
    reloaded        logits of the grafted adapter of the files, loaded over the post-trained model
    padded, packed  logits of a sequence with padding on the left, or beside another one in a row, against it alone
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import FAMILIES, logits, token_batch
from graft.trios import trio_in, trio_with_tokens_in
from peft_moe_delta import graft_checkpoint
from peft_moe_delta.architectures import ATTENTION_MODULES
from peft_moe_delta.errors import PeftMoeDeltaError

TIED = ("gpt2", "bloom", "mpt", "falcon", "gemma", "gemma2", "gemma3_text", "cohere", "smollm3")
ROUTINGS = ("learned", "language", "context", "classifier", "context")
LEAKING = ("falcon", "bloom", "mpt")
"""Families whose positions do not keep packed documents apart; the collator refuses to pack for them."""
SEVERAL, UNEQUAL = {"uralic": 2, "turkic": 1}, {"uralic": [2, 1], "turkic": [1, 0]}
"""Experts that stock architectures can hold, and experts for which only remote code is left."""


@dataclass(frozen=True)
class Case:
    """One kind of graft.

    Attributes:
        target: "stock", "remote_code" or "adapter".
        extra: "", "tokens" (new ones, over a longer vocabulary), or a module of `modules_to_save`.
    """

    family: str
    rank: int | None
    routing: str
    target: str
    extra: str = ""
    attention: str | None = None

    def __str__(self) -> str:
        rank = "full" if self.rank is None else "low-rank"
        return "-".join(filter(None, [self.family, rank, self.routing, self.target, self.extra, self.attention]))

    def trio(self, folder: Path) -> Any:
        options: dict[str, Any] = {"routing": self.routing, "expert_rank": self.rank}
        options["experts"] = UNEQUAL if self.target == "remote_code" else SEVERAL
        if self.routing == "classifier":
            options["classifier_layers"] = [1]
        if self.attention:
            options["attention_experts"] = self.attention
        tied = self.family in TIED
        if self.extra == "tokens":
            return trio_with_tokens_in(folder, self.family, tied=tied, **options)
        if self.extra:
            options["modules_to_save"] = [self.extra]
        return trio_in(folder, self.family, tied=tied, **options)


@dataclass
class Row:
    """What the roads of a case give.

    Attributes:
        memory, files: None, or the error of that road.
        differing: tensors and config fields that differ between the two.
        differences: pair -> largest difference of logits.
    """

    memory: str | None
    files: str | None
    differing: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)


def every_case() -> list[Case]:
    """Every family and kind."""
    cases = [
        Case(family, rank, routing, target, extra)
        for family in FAMILIES
        for rank, routing, target, extra in itertools.product(
            (None, 4), ("learned", "language", "context", "classifier"), ("stock", "remote_code", "adapter"),
            ("", "tokens", "lm_head"),
        )
    ]  # fmt: skip
    cases += [
        Case(family, rank, routing, target, "", kind)
        for family in FAMILIES
        if family in ATTENTION_MODULES
        for rank, routing, target, kind in itertools.product(
            (None, 4), ("learned", "language"), ("remote_code", "adapter"), ("shared_kv", "full")
        )
    ]
    return cases


def covering_cases() -> list[Case]:
    """One case of each family, in which every kind occurs."""
    ranks, routings = itertools.cycle((None, 4)), itertools.cycle(ROUTINGS)
    targets = itertools.cycle(("stock", "remote_code", "adapter", "remote_code"))
    extras = itertools.cycle(("", "tokens", "lm_head", "tokens", "", ""))
    kinds = itertools.cycle((None, None, "shared_kv", None, "full", None, "full"))
    cases = []
    for family in FAMILIES:
        extra, kind = next(extras), next(kinds)
        attention = kind if family in ATTENTION_MODULES and not extra else None
        cases.append(Case(family, next(ranks), next(routings), next(targets), extra, attention))
    return cases


def compare(case: Case, folder: Path) -> Row:
    """Go all roads of a case."""
    trio = case.trio(folder)
    language = "hu" if case.routing == "language" or (case.routing, case.target) == ("context", "stock") else None
    options: dict[str, Any] = {"expert_scale": {"uralic": 0.5}}
    if case.target == "stock" and language:
        options["language"] = language
    grafted, stock = None, None

    def in_memory() -> None:
        nonlocal grafted, stock
        if case.target == "adapter":
            grafted = trio.model.graft(folder / "post", **options)
            grafted.save_pretrained(folder / "memory")
        else:
            stock = trio.model.merge_and_graft(folder / "post", remote_code=case.target == "remote_code", **options)
            stock.save_pretrained(folder / "memory")

    row = Row(
        _error(in_memory),
        _error(lambda: graft_checkpoint(*trio.paths, folder / "files", target=case.target, **options)),
    )
    if row.memory or row.files:
        return row
    row.differing = _differing(folder / "memory", folder / "files")
    tokens = token_batch()
    if stock is not None:
        grafted = trio.model.graft(folder / "post", expert_scale=options["expert_scale"])
        ids = _ids(trio, language, tokens) if case.target == "remote_code" and language else {}
        expected = logits(grafted, tokens, **({"language": language} if language else {}))
        row.differences["export"] = _gap(logits(stock, tokens, **ids), expected)
    elif grafted is not None:
        post = AutoModelForCausalLM.from_pretrained(folder / "post")
        again = PeftModel.from_pretrained(post, folder / "files").eval()
        named = {"language": language} if language else {}
        row.differences["reloaded"] = _gap(logits(again, tokens, **named), logits(grafted, tokens, **named))
    row.differences |= _layouts(grafted, tokens, language, packs=case.family not in LEAKING)
    return row


def _error(road: Any) -> str | None:
    try:
        road()
    except PeftMoeDeltaError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _ids(trio: Any, language: str, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    table = trio.model.peft_config["default"].language_table
    return {"language_ids": torch.full((len(tokens),), table.id_of(language))}


def _differing(memory: Path, files: Path) -> list[str]:
    """Tensors whose bytes differ, and fields of the configs."""
    sides = []
    for folder in (memory, files):
        tensors: dict[str, Any] = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
        sides.append(tensors)
    names = sides[0].keys() | sides[1].keys()
    wrong = [name for name in names if not _same(sides[0].get(name), sides[1].get(name))]
    name = next(name for name in ("config.json", "adapter_config.json") if (memory / name).is_file())
    ours, theirs = (json.loads((folder / name).read_text()) for folder in (memory, files))
    return sorted(wrong) + sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def _layouts(model: Any, tokens: torch.Tensor, language: str | None, *, packs: bool) -> dict[str, float]:
    """The same sequence alone, padded on the left, and packed behind another one."""
    named = {"language": language} if language else {}
    first, second = tokens[:1], tokens[1:2]
    alone = logits(model, second, **named)
    padded, mask = torch.cat([first[:, :3], second], dim=1), torch.ones(1, 10, dtype=torch.int64)
    mask[:, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    positions = {"position_ids": places} if packs else {}
    found = {"padded": _gap(logits(model, padded, attention_mask=mask, **positions, **named)[:, 3:], alone)}
    if packs:
        both = torch.cat([first, second], dim=1)
        positions = {"position_ids": torch.cat([torch.arange(7), torch.arange(7)])[None]}
        packed = logits(model, both, attention_mask=None, use_cache=False, **positions, **named)
        found["packed"] = _gap(packed[:, 7:], alone)
    return found


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def main(families: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| case | memory / files | differing | " + " | ".join(("export", "reloaded", "padded", "packed")) + " |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for case in every_case() if families else covering_cases():
        if families and case.family not in families:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = compare(case, Path(folder))
        roads = "both" if not row.memory and not row.files else "both refuse" if row.memory and row.files else "ONE"
        cells = [f"{row.differences[k]:.1e}" if k in row.differences else "" for k in
                 ("export", "reloaded", "padded", "packed")]  # fmt: skip
        print(f"| {case} | {roads} | {len(row.differing)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
