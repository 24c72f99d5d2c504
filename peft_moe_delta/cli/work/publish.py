"""`card` and `push`, carried out."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from ...errors import CardError
from ...evaluation.report import FILE as REPORT_FILE
from ...evaluation.report import EvalReport
from ...files import read_text
from ...hub import CardFacts, push_to_hub, write_card
from ...hub.card import CARD_FILE, FACTS_FILE, verified_in
from ..options import pairs_of


def card(arguments: Namespace) -> str:
    return "\n".join(str(_write_card(folder, arguments)) for folder in arguments.model)


def _write_card(folder: Path, arguments: Namespace) -> Path:
    report_path = arguments.report or (folder / REPORT_FILE if (folder / REPORT_FILE).is_file() else None)
    own = {"data": arguments.data, "limits": arguments.limit, "measured_as": arguments.measured_as}
    said = {name: value for name, value in own.items() if value is not None}
    written = folder / FACTS_FILE
    if written.is_file():
        facts = replace(CardFacts.from_json(read_text(written)), **said)
        facts = replace(facts, served=verified_in(folder) or facts.served)  # since the card was written
    else:
        facts = CardFacts.of(
            folder,
            name=arguments.name or folder.resolve().name,
            adapter=arguments.adapter,
            base_model=arguments.base_model,
            post_trained=arguments.post_trained,
            parents=pairs_of("--parent", arguments.parent),
            licence=arguments.licence,
            **said,
        )
    return write_card(arguments.output or folder, facts, EvalReport.load(report_path) if report_path else None)


def push(arguments: Namespace) -> str:
    return push_to_hub(
        arguments.model,
        arguments.repository,
        extra_files=card_files(arguments.card) if arguments.card else None,
        base_model=arguments.base_model,
        revision=arguments.revision,
        private=arguments.private,
        message=arguments.message,
    )


def card_files(folder: Path) -> dict[str, Path | bytes]:
    """The card in a folder and what it was rendered from."""
    if not (folder / CARD_FILE).is_file():
        raise CardError(f"No card in {folder}: expected {CARD_FILE}. `peft-moe-delta card` writes one.")
    return {path.name: path for path in sorted(folder.iterdir()) if path.name in (CARD_FILE, FACTS_FILE, REPORT_FILE)}
