"""A pipeline from a file: base model, text and tasks in; a grafted stock checkpoint and a report of what it gained out.

- `reader`, `fields`, `growth`: what a file says, read without PyTorch, so that a mistake in it is found at once
- `run`: the steps of a recipe; `workspace`: steps whose results are kept; `data`: texts and tasks
- `checks`, `foresight`: what can be refused before anything is made; `preview`: what a run would do
- `growth_foresight`, `timing`: the same for a growth file; how long an expansion takes here
- `starter`: a recipe to begin with
- `stages`: the steps that train; `grafting`: the graft, tried out; `scoring`, `reporting`: what came of it
- `cards`: what to tell others about it
- `growing`: further languages for an adapter
"""

from .fields import Recipe, read_recipe

__all__ = ["Recipe", "read_recipe"]
