"""What benchmarks share that compare ways of training one small model, so that only what is named differs.

In: text of several languages. Out: a JSON file with what every model costs and the bits of every held-out document.
From it `verdicts.py` makes tables and sentences. All ways of one random seed read the same rows in the same order;
each has the learning rate, of the same few, that was best on validation text with the first seed. Seeds that are in
the file are not run again: delete it to have everything made anew.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from measure import conditions, keep_memory  # before torch: it sets how threads wait

import torch  # isort: skip
from learning import cosine, train
from pairs import ENGLISH, LENGTH, ROWS, make_tokenizer
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from verdicts import Scores, filled

from peft_moe_delta.budget.weightless import Meter
from peft_moe_delta.errors import DataError
from peft_moe_delta.evaluation import bits_per_byte
from peft_moe_delta.files import write_text
from peft_moe_delta.graft.memory import tuner_of
from peft_moe_delta.sources import read_texts

RESULTS = Path(__file__).parent / "results"
TEXT = Path("build/demo/inputs/more_text")
TRAINED, VALIDATED, TESTED = 550, 19, 40
"""Documents of every language."""
CHARACTERS = 200  # of a held-out document
NOTHING = "This version of the benchmark has not been run yet, so there is nothing to claim here."
Row = dict[str, Any]


# -- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """As many documents of each language, drawn at random once.

    Attributes:
        parts: "train", "validation" and "test", each language -> documents; held-out ones are cut to `CHARACTERS`.
        tokenizer: of all languages.
    """

    parts: Mapping[str, Mapping[str, list[str]]]
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def read(cls, folder: Path, codes: Sequence[str]) -> Corpus:
        """Of `folder/<language>/<part>.jsonl`, which examples/demo_inputs.py makes."""
        parts = {}
        for part, number in (("train", TRAINED), ("validation", VALIDATED), ("test", TESTED)):
            texts = {code: read_texts(folder / code / f"{part}.jsonl") for code in codes}
            parts[part] = {code: random.Random(0).sample(found, number) for code, found in texts.items()}
        return cls.of(parts)

    @classmethod
    def of(cls, parts: Mapping[str, Mapping[str, list[str]]]) -> Corpus:
        """Cut held-out documents to size, and make a tokenizer."""
        cut = {
            part: {code: [d if part == "train" else d[:CHARACTERS] for d in texts] for code, texts in found.items()}
            for part, found in parts.items()
        }
        return cls(cut, make_tokenizer(cut["train"]))

    def sizes(self) -> dict[str, list[int]]:
        """Bytes of the test documents, by language."""
        return {code: [len(d.encode()) for d in documents] for code, documents in self.parts["test"].items()}


class Batch(NamedTuple):
    """Rows of one optimizer step, and the language of each."""

    codes: list[str]
    ids: Tensor


def batches(rows: Mapping[str, Tensor], codes: Iterable[str], steps: int, name: str) -> list[Batch]:
    """Random rows of languages that take turns; one `name` gives the same batches every time."""
    drawn, turns = random.Random(name), cycle(codes)
    named = [list(islice(turns, ROWS)) for _ in range(steps)]
    return [Batch(names, torch.stack([rows[c][drawn.randrange(len(rows[c]))] for c in names])) for names in named]


def tokens(read: Iterable[Batch]) -> int:
    """How many there are in batches."""
    return sum(batch.ids.numel() for batch in read)


def as_text(read: Iterable[Batch], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[str]]:
    """The rows of batches by language, as `fit_routers` reads them."""
    found: dict[str, list[str]] = {}
    for batch in read:
        for code, text in zip(batch.codes, tokenizer.batch_decode(batch.ids), strict=True):
            found.setdefault(code, []).append(text)
    return found


# -- models -----------------------------------------------------------------------------------------------------------


def learn(model: nn.Module, read: Sequence[Batch], rate: float) -> None:
    """AdamW with a cosine down to nothing; experts are told the language of each row."""
    steps, told = len(read), isinstance(model, PeftModel)
    inputs = (
        {"input_ids": b.ids, "labels": b.ids, "use_cache": False, **({"language": b.codes} if told else {})}
        for b in read
    )
    train(model, inputs, rate, cosine(steps, max(1, steps // 10), 0.0), steps=steps, weight_decay=0.01)


def pretrain(model: nn.Module, rows: Mapping[str, Tensor], steps: int, name: str, rate: float = 4e-3) -> None:
    """On English, with one row in eight of the other languages, which take turns."""
    others = [code for code in rows if code != ENGLISH]
    turns = [code for other in others for code in (*[ENGLISH] * 7, other)]
    learn(model, batches(rows, turns, steps, f"base {name}"), rate)


def bits(model: nn.Module, corpus: Corpus, part: str = "test", codes: Sequence[str] = (), told: bool = False) -> Row:
    """Bits of every held-out document by language (all by default); `told`: the model is told the language."""
    found = {}
    for code in codes or corpus.parts[part]:
        score = bits_per_byte(
            model,
            corpus.tokenizer,
            corpus.parts[part][code],
            language=code if told else None,
            max_length=LENGTH,
            batch_size=32,
        )
        found[code] = [round(float(value), 1) for value in score.bits]
    return found


def row(model: nn.Module, corpus: Corpus, *, read: int = 0, trained: int = 0, **scored: Any) -> Row:
    """What a model costs and how it scores.

    Args:
        read: tokens that it was trained on since the model it began with.
        trained: how many parameters were trained on them.
        scored: as in `bits`.
    """
    return {**costs(model), "trained": trained, "tokens": read, "bits": bits(model, corpus, **scored)}


def costs(model: nn.Module) -> dict[str, int]:
    """All parameters, those that one token passes, and its operations forward, counted on a training row."""
    total, idle = sum(parameter.numel() for parameter in model.parameters()), 0
    if isinstance(model, PeftModel):
        tuner = tuner_of(model)
        plan, used = tuner.plan(), tuner.active_config.experts_per_token
        for index, layer in tuner.layers().items():
            left_out = max(0, plan.num_experts(index) - used)
            idle += left_out * sum(parameter.numel() for parameter in layer.base_layer.parameters())
    with torch.no_grad(), Meter() as meter:
        model(input_ids=torch.arange(LENGTH)[None], use_cache=False)
    return {"parameters": total, "active": total - idle, "flops": round(meter.flops / LENGTH)}


# -- learning rates ---------------------------------------------------------------------------------------------------


@dataclass
class Rates:
    """Learning rates by what is trained: those that are known, and of the others the best on validation text.

    Attributes:
        corpus: where validation text is from.
        known: name -> rate; grows.
    """

    corpus: Corpus
    known: dict[str, float] = field(default_factory=dict)

    def best(self, name: str, rates: Sequence[float], make: Callable[[float], Any]) -> Any:
        """What `make` makes at the best rate: a model, or a list of models whose last one counts."""
        if name in self.known:
            return make(self.known[name])
        tried = [(self._validated(found), rate, found) for rate, found in ((rate, make(rate)) for rate in rates)]
        _, self.known[name], made = min(tried, key=lambda one: one[0])
        return made

    def _validated(self, made: Any) -> float:
        """Bits per byte on validation text: half English, half the mean of the others."""
        found = bits(made[-1] if isinstance(made, list) else made, self.corpus, "validation")
        documents = self.corpus.parts["validation"]
        each = {code: sum(b) / sum(len(d.encode()) for d in documents[code]) for code, b in found.items()}
        return each.pop(ENGLISH) / 2 + statistics.fmean(each.values()) / 2


# -- a benchmark ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A comparison.

    Attributes:
        name: of the file of results, and of the part of the page.
        description: what `--help` says.
        codes: languages, English first.
        settings: () -> what the figures depend on, to be kept with them.
        one_seed: `(corpus, seed, rates)` -> rows by name, and what else is kept of a seed, under names of its own.
        tables: the scores -> Markdown.
    """

    name: str
    description: str
    codes: Sequence[str]
    settings: Callable[[], dict[str, Any]]
    one_seed: Callable[[Corpus, int, Rates], tuple[dict[str, Row], dict[str, Any]]]
    tables: Callable[[Scores], str]

    def main(self) -> None:
        """The command line: run the seeds that are not there yet, print the tables, put them into a page."""
        arguments = self._arguments()
        missing = [code for code in self.codes if not (arguments.text / code).is_dir()]
        if missing:
            print(
                f"no text of {', '.join(missing)} in {arguments.text}, so nothing is trained. Make it with "
                f"examples/demo_inputs.py --output build/demo/inputs --also {' '.join(self.codes)}"
            )
        else:
            keep_memory()
            self.run(Corpus.read(arguments.text, self.codes), range(arguments.seeds), arguments.results)
        made = self.part_of_page(arguments.results)
        print(made)
        if arguments.page:
            page = arguments.page.read_text(encoding="utf-8")
            write_text(arguments.page, filled(page, self.name, made))

    def part_of_page(self, file: Path) -> str:
        """The tables of a file of results; where there is none, that there is nothing to claim."""
        return self.tables(Scores.read(file)) if file.is_file() else NOTHING

    def _arguments(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--text", type=Path, default=TEXT, help="folder of text, a folder a language")
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--results", type=Path, default=RESULTS / f"{self.name}.json", help="file of the scores")
        parser.add_argument("--page", type=Path, help="a Markdown page whose part of this name is made anew")
        return parser.parse_args()

    def run(self, corpus: Corpus, seeds: Iterable[int], file: Path) -> None:
        """Train and score, and write after every seed.

        Raises:
            DataError: the file is of other settings or documents.
        """
        head = {"settings": self.settings(), "sizes": corpus.sizes()}
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {**head, "rates": {}, "seeds": []}
        if any(kept[name] != value for name, value in head.items()):
            raise DataError(
                f"{file}: got scores of other settings or documents than these, which cannot be compared. Delete the "
                "file to have all of them made anew, or give another one with --results."
            )
        rates = Rates(corpus, kept["rates"])
        for seed in (s for s in seeds if s not in [one["seed"] for one in kept["seeds"]]):
            started = time.process_time()
            rows, more = self.one_seed(corpus, seed, rates)
            seconds = round(time.process_time() - started)
            kept["seeds"].append({"seed": seed, "seconds": seconds, "conditions": conditions(), **more, "rows": rows})
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, in_lines(kept))
            print(f"{self.name}, seed {seed}: {seconds} s", flush=True)


def in_lines(kept: Mapping[str, Any]) -> str:
    """JSON with a line for each field and each row: small, and a change shows where it is."""
    seeds = []
    for one in kept["seeds"]:
        fields = [f'"{name}": {json.dumps(value)}' for name, value in one.items() if name != "rows"]
        rows = ",\n".join(f'"{name}": {json.dumps(r, separators=(",", ":"))}' for name, r in one["rows"].items())
        seeds.append("{\n" + ",\n".join([*fields, f'"rows": {{\n{rows}\n}}']) + "\n}")
    fields = [f'"{name}": {json.dumps(value)}' for name, value in kept.items() if name != "seeds"]
    return "{\n" + ",\n".join([*fields, '"seeds": [\n' + ",\n".join(seeds) + "\n]"]) + "\n}\n"
