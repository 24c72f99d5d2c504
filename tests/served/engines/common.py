"""What all engines' programs share: they are asked by one JSON file and answer in another, form by form.

Imports nothing but the standard library, as each engine has an environment of its own.
"""

import json
import sys
import traceback
from pathlib import Path


def option(name):
    """Something that the asker has to say to one engine."""
    return asked()["options"].get(name)


def asked():
    """`forms` (name -> folder), `prompts` (lists of token ids), `max_tokens`, `options`."""
    return json.loads(Path(sys.argv[1]).read_text())


def run(answers, version):
    """Ask an engine about every form that the file of answers does not have yet, and write after each.

    Args:
        answers: folder, prompts and number of tokens -> for each prompt log-probabilities and greedy tokens.
        version: of the engine, in words.
    """
    questions, file = asked(), Path(sys.argv[2])
    found = json.loads(file.read_text()) if file.exists() else {"version": version, "forms": {}}
    for form, folder in questions["forms"].items():
        if form in found["forms"]:
            continue
        found["forms"][form] = {"error": "the engine's process died"}  # unless it lives to say otherwise
        file.write_text(json.dumps(found))
        try:
            rows = list(answers(folder, questions["prompts"], questions["max_tokens"]))
            found["forms"][form] = {"logprobs": [row for row, _ in rows], "ids": [ids for _, ids in rows]}
        except BaseException as error:
            traceback.print_exc()
            found["forms"][form] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
            if isinstance(error, KeyboardInterrupt):
                raise
        file.write_text(json.dumps(found))
