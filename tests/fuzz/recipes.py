"""Recipes and growth files with fields that are gone, renamed, new or of another kind; up to the first training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import yaml

from fuzz.runner import Case
from fuzz.values import damaged, spoilt
from peft_moe_delta.recipe import checks, read_recipe
from peft_moe_delta.recipe.growth import read_growth
from peft_moe_delta.recipe.run import Run


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Endless recipe and growth files over the files of `workspace.make`."""
    random = Random(seed)
    good = {name: yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("recipe", "grow")}
    while True:
        name = random.choice(["recipe", "recipe", "recipe", "grow"])
        file = folder / "damaged" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        if random.random() < 0.2:
            damaged(random, folder / f"{name}.yaml", file)
        else:
            text = yaml.safe_dump(spoilt(random, good[name]), sort_keys=False, allow_unicode=random.random() < 0.5)
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
        content = file.read_bytes()
        yield f"{name} {content!r:.3000}", partial(_read, file, name)


def _read(file: Path, name: str) -> None:
    if name == "grow":
        read_growth(file)
        return
    recipe = read_recipe(file, quick=True)
    Run(recipe)
    checks.check_graft(recipe)
    checks.check_held_out(recipe)
    checks.check_text(recipe)
