"""Grafting from files to files, at any size.

- `adapter`: a saved adapter, read lazily
- `weights`: the grafted weights, computed as they are asked for
- `targets`: what they are written as
- `side_files`: tokenizer and generation config, with the adapter's new tokens
- `job`: `graft_checkpoint`, the job from opening to manifest
- `check`: the built models' logits and routes, compared on request
"""

from .job import graft_checkpoint

__all__ = ["graft_checkpoint"]
