"""`measure`, `group` and `allocate`: from text of each language to a plan, by way of two readable files."""

from __future__ import annotations

from .options import Command, Options, new_file, new_picture

SOURCES = ("similarity", "deviation", "gradients", "representations")
STRATEGIES = ("uniform", "inverse_similarity", "inverse_similarity_published", "deviation_threshold")

MEASURE = Options()
MEASURE.add("model", required=True, help="the base model: a Hub id or a folder")
MEASURE.add("text", pairs=True, metavar="CODE=FILE", help="text of a language; twice or more")
MEASURE.add("sources", default=["similarity", "deviation"], nargs="+", choices=SOURCES, help="what to measure")
MEASURE.add("tokens", type=int, help="of a language, for all but deviation; default 5000")
MEASURE.add("steps", type=int, help="of tuning a language, for deviation; default 10")
MEASURE.add("step_sequences", type=int, help="sequences a step; default 1")
MEASURE.add("sequence_length", type=int, help="tokens; default 512")
MEASURE.add("learning_rate", type=float, help="of the tuning; default 8e-6")
MEASURE.add("vector_layers", type=int, help="last layers that tell languages apart by their weights; default 3, 0 all")
MEASURE.add("seed", type=int, help="of the choice of documents; default 0")
MEASURE.add("batch_size", type=int, default=4, help="sequences at a time; changes nothing but time and memory")
MEASURE.add("output", type=new_file, required=True, help="the JSON file to write")
MEASURE.add("merge", metavar="FILE", help="statistics of the same model and languages, to keep beside the new ones")
MEASURE.add("picture", type=new_picture, metavar="PNG", help="similarity and deviation by depth; needs matplotlib")

GROUP = Options()
GROUP.add("statistics", required=True, help="what `measure` wrote, or JSON {language: {language: similarity}}")
GROUP.add("source", default="deviation", choices=SOURCES, help="what to group by; default deviation")
GROUP.add("layers", nargs="+", type=int, help="by which layers; default: deviation the last three, others all")
GROUP.add("original", default=[], nargs="+", metavar="CODE", help="languages the base model speaks: not grouped")
GROUP.add("num_groups", type=int, help="how many groups")
GROUP.add("sizes", nargs=2, type=int, metavar=("FEWEST", "MOST"), help="or: how many languages a group")
GROUP.add("seed", type=int, default=0, help="of the resampling")
GROUP.add("output", type=new_file, required=True, help="the JSON file to write")
GROUP.add("picture", type=new_picture, metavar="PNG", help="dendrogram and heat map; needs matplotlib and scipy")

ALLOCATE = Options()
ALLOCATE.add("statistics", required=True, help="what `measure` wrote, or JSON: a number a layer, or that by language")
ALLOCATE.add("strategy", default="inverse_similarity", choices=STRATEGIES, help="default inverse_similarity")
ALLOCATE.add("budget", type=int, help="new experts over all layers")
ALLOCATE.add("groups", metavar="FILE", help="what `group` wrote")
ALLOCATE.add("language", pairs=True, metavar="CODE=GROUP", help='instead of --groups; "original" for those known')
ALLOCATE.add("floor", type=int, default=1, help="fewest new experts a layer; default 1")
ALLOCATE.add("ceiling", type=int, help="most new experts a layer")
ALLOCATE.add("threshold", type=float, default=0.6, help="of deviation_threshold; default 0.6")
ALLOCATE.add("top_layers", type=int, help="instead of a threshold: so many layers")
ALLOCATE.add("max_params", type=int, help="instead of a threshold: as many layers as these parameters pay for")
ALLOCATE.add("experts_per_group", type=int, default=1, help="in a chosen layer; default 1")
ALLOCATE.add("output", type=new_file, required=True, help="the JSON file to write")
ALLOCATE.add("picture", type=new_picture, metavar="PNG", help="the plan; needs matplotlib")

COMMANDS = (
    Command(
        "measure",
        "how alike languages are to a model, layer by layer",
        MEASURE.add_arguments,
        "allocation:measure",
        MEASURE.read,
    ),
    Command("group", "which languages share experts", GROUP.add_arguments, "allocation:group", GROUP.read),
    Command(
        "allocate",
        "how many experts each layer gets: a plan for MoeDeltaConfig",
        ALLOCATE.add_arguments,
        "allocation:allocate",
        ALLOCATE.read,
    ),
)
