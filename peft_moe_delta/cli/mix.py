"""`mix`: a seed and dense models trained from it become one upcycled model."""

from __future__ import annotations

from argparse import ArgumentParser

from .options import Command, new_folder


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("seed", help="the checkpoint all branches started from: a Hub id or a folder")
    parser.add_argument("--branch", action="append", default=[], metavar="GROUP=CHECKPOINT", help="twice or more")
    parser.add_argument(
        "--language", action="append", default=[], metavar="CODE=GROUP", help='"original" is the seed\'s group'
    )
    parser.add_argument(
        "--others",
        default="seed",
        help="weights outside of experts: seed (default), average, or GROUP=WEIGHT,... (original for the seed)",
    )
    parser.add_argument(
        "--base-output", type=new_folder, help="folder of the new dense base, for any --others but seed"
    )
    parser.add_argument("--attention-experts", choices=("shared_kv", "full"), help="BAM; default: none")
    parser.add_argument("--routing", default="learned", help="as in MoeDeltaConfig")
    parser.add_argument("--top-k", type=int, help="experts a token; default 2")
    parser.add_argument(
        "--text", action="append", default=[], metavar="CODE=FILE", help="fit the routers in closed form on text"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what would be made, in seconds; make nothing"
    )
    parser.add_argument("--output", type=new_folder, required=True, help="folder of the adapter")


COMMANDS = (Command("mix", "dense models trained from one seed become the experts of one", _add_arguments, "mix:run"),)
