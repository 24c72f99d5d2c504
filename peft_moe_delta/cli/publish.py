"""`card` and `push`: say what a model is, and take it to the Hub."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from ..errors import CardError
from ..evaluation.report import FILE as REPORT_FILE
from ..evaluation.report import EvalReport
from ..files import read_text
from ..hub import CardFacts, push_to_hub, write_card
from ..hub.card import CARD_FILE, FACTS_FILE
from .options import Command, new_folder, pairs_of


def _add_card_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="+",
        type=Path,
        help=f"folder of an adapter or checkpoint, or of a {FACTS_FILE} to render again",
    )
    parser.add_argument("--name", help="the card's title (default: the folder's name)")
    parser.add_argument("--adapter", type=Path, help="the adapter that a stand-alone model was made from")
    parser.add_argument("--report", type=Path, help="what `evaluate` wrote")
    parser.add_argument("--measured-as", help="what the report calls this model")
    parser.add_argument("--base-model", help="Hub id of the base model")
    parser.add_argument("--post-trained", help="Hub id of the post-trained model")
    parser.add_argument("--parent", action="append", default=[], metavar="MODEL=LICENCE", help="a parent's licence")
    parser.add_argument("--licence", help="what to state; never laxer than the parents' (default: the strictest)")
    parser.add_argument("--data", help="what it was trained on")
    parser.add_argument("--limit", action="append", help="what a user must know; may be given several times")
    parser.add_argument("--output", type=new_folder, help="folder for the card (default: the model's)")


def _card(arguments: Namespace) -> str:
    return "\n".join(str(_write_card(folder, arguments)) for folder in arguments.model)


def _write_card(folder: Path, arguments: Namespace) -> Path:
    report_path = arguments.report or (folder / REPORT_FILE if (folder / REPORT_FILE).is_file() else None)
    own = {"data": arguments.data, "limits": arguments.limit, "measured_as": arguments.measured_as}
    said = {name: value for name, value in own.items() if value is not None}
    written = folder / FACTS_FILE
    if written.is_file():
        facts = replace(CardFacts.from_json(read_text(written)), **said)
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


def _add_push_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the folder that save_pretrained, `train` or `graft` wrote")
    parser.add_argument("repository", help="user/name on the Hub; made if it is not there")
    parser.add_argument("--card", type=Path, help="folder that `card` wrote (default: the model's own)")
    parser.add_argument("--base-model", help="Hub id of an adapter's base model, where it was trained over a folder")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--message", help="of the commit")


def _push(arguments: Namespace) -> str:
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


COMMANDS = (
    Command("card", "the model card, from the model's files and a report", _add_card_arguments, _card),
    Command("push", "a model and its card to the Hub, in one commit", _add_push_arguments, _push),
)
