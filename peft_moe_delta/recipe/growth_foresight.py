"""Whether an adapter can grow as a file says, found out in seconds and before anything is made: every fault at once.

In: a `Growth`. Out: a `GrowthOutlook`, or an error. Of the adapter only its config is read, of the base model its
config and tokenizer, of text the first documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from ..budget import Job, measure
from ..errors import RecipeError
from ..kinds import size_text
from ..loading import load_adapter_config, load_config, load_tokenizer
from ..tuner import MoeDeltaConfig
from ..tuner.growing import foreseen_growth
from .fields import Training
from .foresight import Found, check_amount, check_memory, look_at_documents
from .growing import base_of, review_shares
from .growth import CLOSEST, Growth
from .preview import table
from .stages import settled_precision


@dataclass(frozen=True)
class GrowthOutlook:
    """What growing would do.

    Attributes:
        growth: the file.
        new: language -> group, of those that the adapter does not know.
        job: the expansion, or where there is none a single row of it, as the budget measures it.
        memory: bytes that it takes, and bytes that there are.
        doubts: what looks wrong, and need not be.
    """

    growth: Growth = field(repr=False)
    new: dict[str, str]
    job: Job = field(repr=False)
    memory: tuple[int, int]
    doubts: list[str]

    def __str__(self) -> str:
        growth = self.growth
        rows = [("stage", "trains", "on")]
        if growth.expand is not None:
            rows.append(("expand", f"experts of {', '.join(growth.experts) or 'no group'}", _amount(growth.expand)))
        if growth.review is not None:
            rows.append(("review", "the new rows of routers", _amount(growth.review)))
        added = ", ".join(f"{code} ({group})" for code, group in self.new.items()) or "none"
        lines = [f"Languages that are added: {added}.", ""]
        lines += [table(rows) if len(rows) > 1 else "Nothing trains: the new experts stay as they start.", ""]
        needed, there = map(size_text, self.memory)
        lines.append(f"Training takes about {needed} of memory; there are {there}.")
        lines.append(f"The grown adapter: {growth.output}. {growth.adapter} stays as it is.")
        return "\n".join([*lines, *(f"Doubtful: {doubt}" for doubt in self.doubts), "Nothing was run."])


def look_ahead_of_growth(growth: Growth) -> GrowthOutlook:
    """Check a growth file, and say what it would do.

    Raises:
        PeftMoeDeltaError: something stands in the way; with several faults a `RecipeError` that lists them.
    """
    adapter = load_adapter_config(growth.adapter)
    if not isinstance(adapter, MoeDeltaConfig):
        raise RecipeError(f"adapter: {growth.adapter} has no experts of this package; it is {adapter.peft_type}.")
    base, found = base_of(growth, adapter), Found()
    new = {code: language.group for code, language in growth.languages.items() if code not in adapter.languages}
    start_from = None if growth.start_from == CLOSEST else growth.start_from
    grown, _ = foreseen_growth(adapter, new, growth.experts, start_from)
    _look_at_text(growth, base, new, grown, found)
    job = _expansion(growth, base, grown)
    trains = "review" if growth.expand is None and growth.review is not None else "expand"
    with found.of():
        advice = f"Lower {trains}.batch_size or {trains}.sequence_length, or take another machine."
        memory = check_memory({trains: (measure(job).total, advice)})
    found.refuse()
    return GrowthOutlook(growth, new, job, memory, found.doubts)


def _look_at_text(growth: Growth, base: str, new: dict[str, str], grown: MoeDeltaConfig, found: Found) -> None:
    """The first documents of every language, and whether there are enough of them."""
    tokenizer = load_tokenizer(base)
    wanted: list[tuple[str, list[str], Training]] = []
    if growth.expand is not None and new:
        wanted.append(("expand", list(new), growth.expand))
    if growth.review is not None:
        with found.of():
            shares = review_shares(growth, grown.language_table, growth.review)
            wanted += [("review", codes, share) for codes, share in shares]
    for code, language in growth.languages.items():
        name = f"languages.{code}.train"
        with found.of(name):
            look_at_documents(name, code, language.train, found)
            for stage, codes, share in wanted:
                if code in codes:
                    needed = ceil(share.sequences / len(codes)) * share.sequence_length
                    check_amount(language.train, code, tokenizer, needed, stage)


def _expansion(growth: Growth, base: str, grown: MoeDeltaConfig) -> Job:
    training = growth.expand or growth.review
    batch, length = (1, 2) if training is None else (training.batch_size, training.sequence_length)
    return Job(
        model=load_config(base),
        adapter=replace(grown, inference_mode=False, verify_base=False),
        batch_size=batch,
        sequence_length=length,
        autocast=settled_precision(growth.precision) == "bf16",
        checkpointing=training is not None and training.checkpointing,
    )


def _amount(training: Training) -> str:
    return f"{training.sequences * training.sequence_length:,} tokens"
