"""`graft`, `lora`, `verify`, `explain`: files from files, whether they are still what was written, what would fit."""

from __future__ import annotations

from argparse import ArgumentParser

from ..engines import ARCHITECTURES, ENGINES
from .options import Command, new_folder


def _add_graft_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", help="the model that the adapter was trained on: folder or Hub id, as the next two")
    parser.add_argument("post_trained", help="its post-trained descendant")
    parser.add_argument("adapter", help="the trained adapter")
    parser.add_argument("output", type=new_folder, help="the folder to make")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the post-training delta (1)")
    parser.add_argument(
        "--expert-scale", action="append", default=[], metavar="A | GROUP=A",
        help="share of the experts' own change (1): of all, or of a group; both together: of a group and of the others",
    )  # fmt: skip
    parser.add_argument(
        "--target", choices=("stock", "remote_code", "adapter"), default="stock",
        help="a stand-alone checkpoint (stock), one with a modelling file of its own, which holds what no stock "
        "architecture does, or an adapter over the post-trained model",
    )  # fmt: skip
    parser.add_argument("--language", help="for routing by language: what this language runs on")
    parser.add_argument(
        "--replicate-dense-layers", action="store_true",
        help="where no architecture keeps dense layers, write copies of their one expert",
    )  # fmt: skip
    parser.add_argument(
        "--for", dest="serve_with", choices=tuple(ENGINES),
        help="the engine that is to run it: takes a form that it runs exactly, or says what fits",
    )  # fmt: skip
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES,
        help="the stock architecture to take (default: the first that is exact)",
    )  # fmt: skip
    parser.add_argument("--shard-size", default="5GB", help="most bytes of a weights file (5GB)")
    parser.add_argument("--check", action="store_true", help="compare logits with the adapter's; builds both models")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds files")


def _add_verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder that `graft` has written")


def _add_explain_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder or Hub id of the adapter; only its config is read")
    parser.add_argument("--post-trained", help="the model it is to be grafted onto; default: the adapter's base model")


def _add_lora_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="a grafted adapter (`graft --target adapter`): folder or Hub id")
    parser.add_argument("output", type=new_folder, help="the folder to make, with a LoRA for each new language")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds files")


COMMANDS = (
    Command(
        "graft",
        "graft an adapter onto the post-trained model, from files to files",
        _add_graft_arguments,
        "graft:graft",
    ),
    Command(
        "lora", "an adapter's languages as LoRA folders, for servers that load many", _add_lora_arguments, "graft:lora"
    ),
    Command("verify", "check a grafted folder against its manifest", _add_verify_arguments, "graft:verify"),
    Command("explain", "what an adapter can be shipped as, and why", _add_explain_arguments, "graft:explain"),
)
