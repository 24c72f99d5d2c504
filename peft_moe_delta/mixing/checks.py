"""Whether a branch can be mixed with a seed.

In: two checkpoint folders. Out: the branch's folder, or an error that names what differs: the architecture, a config
field that changes what weights mean, a tensor's shape, the tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import CheckpointReader, first_few
from ..errors import CheckpointError
from ..loading import load_config, load_tokenizer

_MEANING = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters",
    "layer_types", "sliding_window", "rms_norm_eps", "layer_norm_eps", "tie_word_embeddings", "logit_scale",
)  # fmt: skip
"""Config fields under which the same tensors compute something else."""


def check_branch(seed: Path, branch: Path) -> Path:
    """Refuse a branch that did not grow from such a seed; gives the branch's folder back.

    Raises:
        CheckpointError: architecture, config, names, shapes or tokenizer differ, or a file cannot be read.
    """
    ours, theirs = (load_config(folder) for folder in (seed, branch))
    for field in _MEANING:
        one, other = getattr(ours, field, None), getattr(theirs, field, None)
        if one != other:
            raise CheckpointError(
                f"The seed {seed} has {field} {one!r}, the branch {branch} {other!r}. Branches must be continued from "
                "the seed: same architecture, same sizes, same tokenizer."
            )
    _check_shapes(CheckpointReader(seed), CheckpointReader(branch))
    _check_tokenizers(seed, branch)
    return branch


def _check_shapes(seed: CheckpointReader, branch: CheckpointReader) -> None:
    tied = {"lm_head.weight"}  # where the head is the embedding, some checkpoints list it all the same
    missing = set(seed) - set(branch) - tied
    different = [
        f"{name} {seed.shapes[name]} and {branch.shapes[name]}"
        for name in seed
        if name in branch and seed.shapes[name] != branch.shapes[name]
    ]
    if missing or different:
        raise CheckpointError(
            f"The branch {branch.path} has not the seed's tensors: missing {first_few(sorted(missing))}; shapes that "
            f"differ, seed and branch: {first_few(different)}. Other first sizes of the embeddings mean another "
            "vocabulary. Mix models continued from one seed."
        )


def _check_tokenizers(seed: Path, branch: Path) -> None:
    """Every token has one id in both, as far as both come with a tokenizer."""
    if not all((folder / "tokenizer_config.json").is_file() for folder in (seed, branch)):
        return
    ours, theirs = (load_tokenizer(folder).get_vocab() for folder in (seed, branch))
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if differing:
        raise CheckpointError(
            f"The tokenizers of {seed} and {branch} differ in {len(differing)} tokens, such as {differing[0]!r}. "
            "Experts of one model read the same tokens: mix branches that kept the seed's tokenizer."
        )
