"""`delta`: compute what post-training changed, look at it, combine several, apply one; to share without the models."""

from __future__ import annotations

from argparse import ArgumentParser

from .options import Command, new_file, new_folder, new_picture


def _add_arguments(parser: ArgumentParser) -> None:
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    compute = jobs.add_parser("compute", help="post-trained minus base, into one file")
    compute.add_argument("base", help="a Hub id or a folder")
    compute.add_argument("post_trained", help="a Hub id or a folder")
    compute.add_argument("--rank", type=int, help="keep only this rank of every matrix, by SVD")
    inspect = jobs.add_parser("inspect", help="how large it is, part by part, and whether grafting looks doubtful")
    inspect.add_argument("file")
    inspect.add_argument("--base", help="with --adapter: the base model, a Hub id or a folder")
    inspect.add_argument("--adapter", help="compare with what an adapter's experts learnt: a Hub id or a folder")
    inspect.add_argument(
        "--picture", type=new_picture, help="draw it layer by layer: a .png, .svg or .pdf to write; needs matplotlib"
    )
    combine = jobs.add_parser("combine", help="a weighted sum of deltas over one base")
    combine.add_argument("--delta", action="append", required=True, metavar="FILE=WEIGHT", help="once or more")
    apply = jobs.add_parser("apply", help="a delta over its base, as a model's folder to graft from")
    apply.add_argument("file")
    apply.add_argument("base", help="the base model: a Hub id or a folder")
    apply.add_argument(
        "--like",
        metavar="MODEL",
        help="where config, tokenizer and chat template are from, without weights: a Hub id or a folder (the base)",
    )
    apply.add_argument("--output", type=new_folder, required=True, help="the folder to write")
    apply.add_argument("--overwrite", action="store_true", help="replace an output folder that holds files")
    for job in (compute, combine):
        job.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            default="float32",
            help="that it is stored in; default float32",
        )
        job.add_argument("--output", type=new_file, required=True, help="the file to write")


COMMANDS = (
    Command("delta", "what post-training changed: compute, inspect, combine, apply", _add_arguments, "delta:run"),
)
