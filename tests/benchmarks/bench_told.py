"""What reading the language costs beside being told it: the demo's model routed by context, after `make demo`.

    python tests/benchmarks/bench_told.py [RECIPE]

The grafted model in `by_context` of the recipe's output is scored twice on the recipe's held-out text and tasks: with
the language read from the text, as it ships, and with the language of each text named (text that belongs to no language
of the adapter is named as an original one, so that it runs on the post-trained model). Printed: bits per byte of each
text and the share of exact answers of each set of tasks, both ways.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import print_table

from peft_moe_delta.evaluation import bits_per_byte, exact_match
from peft_moe_delta.languages import ORIGINAL_GROUP
from peft_moe_delta.loading import load_tokenizer
from peft_moe_delta.recipe import read_recipe
from peft_moe_delta.recipe.scoring import arithmetic, material_of, ready
from peft_moe_delta.recipe.stages import BY_CONTEXT, load_made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="examples/demo.yaml")
    parser.add_argument("--quick", action="store_true", help="the recipe's rehearsal, after `make demo-quick`")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe, quick=arguments.quick)
    folder = Path(recipe.output) / BY_CONTEXT
    if not folder.is_dir():
        print(f"skipped: there is no {folder}; make demo makes it")
        return
    model, tokenizer, material = ready(load_made(folder, recipe), recipe), load_tokenizer(folder), material_of(recipe)
    original = next(code for code, language in recipe.languages.items() if language.group == ORIGINAL_GROUP)
    rows = []
    with arithmetic(recipe):
        for code, documents in material.texts.items():
            name = code if code in recipe.languages else original
            read, told = (bits_per_byte(model, tokenizer, documents, language=given).value for given in (None, name))
            rows.append((f"{code}, bits per byte", f"{read:.4f}", f"{told:.4f}", f"{read - told:+.4f}"))
        for label, tasks in material.tasks.items():
            name = tasks.language if tasks.language in recipe.languages else original
            read, told = (exact_match(model, tokenizer, tasks.tasks, language=given).value for given in (None, name))
            rows.append((f"{label}, exact answers", f"{read:.4f}", f"{told:.4f}", f"{read - told:+.4f}"))
    print_table(f"{folder}: the language read from the text, and told", ("", "read", "told", "difference"), rows)


if __name__ == "__main__":
    main()
