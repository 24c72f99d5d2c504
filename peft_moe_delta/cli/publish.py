"""`card` and `push`: say what a model is, and take it to the Hub."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from .options import Command, new_folder


def _add_card_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="+",
        type=Path,
        help="folder of an adapter or checkpoint, or of a card.json to render again",
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


def _add_push_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the folder that save_pretrained, `train` or `graft` wrote")
    parser.add_argument("repository", help="user/name on the Hub; made if it is not there")
    parser.add_argument("--card", type=Path, help="folder that `card` wrote (default: the model's own)")
    parser.add_argument("--base-model", help="Hub id of an adapter's base model, where it was trained over a folder")
    parser.add_argument("--revision", help="branch to commit to (default: main)")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--message", help="of the commit")


COMMANDS = (
    Command("card", "the model card, from the model's files and a report", _add_card_arguments, "publish:card"),
    Command("push", "a model and its card to the Hub, in one commit", _add_push_arguments, "publish:push"),
)
