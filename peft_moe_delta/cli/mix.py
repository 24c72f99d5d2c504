"""`mix`: a seed and dense models trained from it become one upcycled model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..checkpoint import whole_folder
from ..files import read_texts
from ..mixing import fit_routers, mix
from .options import Command, new_folder, pairs_of


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
        "--text", action="append", default=[], metavar="CODE=FILE", help="fit the routers in closed form on jsonl text"
    )
    parser.add_argument("--output", type=new_folder, required=True, help="folder of the adapter")


def _run(arguments: Namespace) -> str:
    others = arguments.others
    if "=" in others:
        others = pairs_of("--others", others.split(","), float)
    given = pairs_of("--text", arguments.text)
    texts = {code: read_texts(path) for code, path in given.items()}  # before anything is written
    options = {} if arguments.attention_experts is None else {"attention_experts": arguments.attention_experts}
    with whole_folder(arguments.output) as folder:
        model = mix(
            arguments.seed,
            pairs_of("--branch", arguments.branch),
            pairs_of("--language", arguments.language) or None,
            others=others,
            base_output=arguments.base_output,
            routing=arguments.routing,
            top_k=arguments.top_k,
            **options,
        )
        if texts:
            fit_routers(model, texts).save(folder / "router_statistics.safetensors")
        model.save_pretrained(str(folder))
    return f"adapter: {arguments.output}\nits base: {model.active_peft_config.base_model_name_or_path}"


COMMANDS = (Command("mix", "dense models trained from one seed become the experts of one", _add_arguments, _run),)
