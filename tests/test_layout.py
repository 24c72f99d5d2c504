"""The arrows between modules: who may import whom, who may print, who may touch PEFT's registries.

Read from the source, so an import inside a function, under `TYPE_CHECKING` or by name counts like any other.
A new room gets a line in `LEVELS`, in the same place as in the design's table. Files import one another at their top
and in no circle.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "peft_moe_delta"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# A room is a folder or a flat module of the package. It imports rooms of lower levels and itself.
LEVELS = {
    "documents": 0,
    "errors": 0,
    "files": 0,
    "languages": 0,
    "architectures": 0,
    "padding": 0,
    "tensors": 0,
    "kinds": 0,
    "engines": 0,
    "program": 0,
    "matrices": 0,
    "attention": 1,
    "plan": 1,
    "sources": 1,
    "losses": 1,
    "streams": 1,
    "loading": 1,
    "checkpoint": 1,
    "routing": 2,
    "export": 3,
    "tuner": 4,
    "allocation": 5,
    "budget": 5,
    "identifier": 5,
    "mixing": 5,
    "monitor": 5,
    "training": 5,
    "vocabulary": 5,
    "evaluation": 5,
    "graft": 6,
    "hub": 6,
    "pretrained": 6,
    "served": 6,
    "model": 7,
    "calibration": 8,
    "registration": 8,
    "recipe": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
# Arrows within a level: everyone raises the package's errors, new tokens are measured, trainers are watched, training
# text is identified.
WITHIN_A_LEVEL = {
    ("languages", "errors"), ("architectures", "errors"), ("architectures", "matrices"),
    ("matrices", "errors"), ("matrices", "tensors"), ("padding", "errors"), ("tensors", "errors"),
    ("kinds", "errors"), ("documents", "errors"), ("files", "documents"), ("files", "errors"),
    ("evaluation", "vocabulary"), ("training", "monitor"), ("training", "evaluation"),
}  # fmt: skip

TENSORS_AND_FILES_ONLY = {"tensors", "checkpoint"}  # use neither of the next line's libraries
MODEL_LIBRARIES = {"peft", "transformers"}
MAY_PRINT_AND_EXIT = {"cli"}
MAY_REGISTER = "registration"

EXITS = {"sys.exit", "os._exit"}
STREAMS = {"sys.stdout", "sys.stderr"}


def module_name(path: Path) -> str:
    """`tuner/layer.py` -> `tuner.layer`; a folder's `__init__.py` keeps its last part."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def dotted(node: ast.AST) -> str:
    """The text of `a.b.c`, or nothing for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def absolute(module: str, node: ast.ImportFrom) -> str:
    """What a `from ... import` reads from, with leading dots resolved against the module it stands in."""
    if not node.level:
        return node.module or ""
    folder = [PACKAGE, *module.split(".")][: -node.level]
    return ".".join([*folder, *([node.module] if node.module else [])])


def imported(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that is imported, names of `from` imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{absolute(module, node)}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def arrow_violation(room: str, target: str) -> str | None:
    """Why `room` may not import `target`, a dotted name that starts with the package's own."""
    other = room_of(target.removeprefix(PACKAGE).lstrip(".") or "__init__")
    if other not in LEVELS:
        if (ROOT / other).is_dir() or (ROOT / f"{other}.py").is_file():
            return None  # the room itself fails with the advice to place it
        other = "__init__"  # a name of the package's index, not a room
    if other == room or LEVELS[other] < LEVELS[room] or (room, other) in WITHIN_A_LEVEL:
        return None
    if other == "__init__":
        return f"imports {target} from the package's index: import it from the module that defines it"
    return f"imports {other} (level {LEVELS[other]}) but is on level {LEVELS[room]}: only lower levels"


def registers(name: str) -> bool:
    """Whether a dotted name is PEFT's table of methods: the module or one of its three mappings."""
    return name == "peft.mapping" or name.startswith("peft.mapping.") or "PEFT_TYPE_TO_" in name.split(".")[-1]


def violations(module: str, source: str) -> list[str]:
    """Everything in a module's source that breaks the layout, each as `module:line: what`."""
    room = room_of(module)
    if room not in LEVELS:
        return [f"{module}: has no level; place {room!r} in LEVELS of tests/test_layout.py and in the design's table"]
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    for line, name in imported(module, tree):
        top = name.split(".")[0]
        if top == PACKAGE and (why := arrow_violation(room, name)):
            found.append((line, why))
        if top in MODEL_LIBRARIES and room in TENSORS_AND_FILES_ONLY:
            found.append((line, f"imports {top}: {room} works on tensors and files alone"))
        if name in EXITS and room not in MAY_PRINT_AND_EXIT:
            found.append((line, f"imports {name}: only cli exits; raise an error"))
        if registers(name) and module != MAY_REGISTER:
            found.append((line, f"imports {name}: only registration.py touches PEFT's registries"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and registers(dotted(node)) and module != MAY_REGISTER:
            found.append((node.lineno, f"uses {dotted(node)}: only registration.py touches PEFT's registries"))
        if room in MAY_PRINT_AND_EXIT:
            continue
        if isinstance(node, ast.Name) and node.id in {"print", "exit", "quit", "SystemExit"}:
            found.append((node.lineno, f"uses {node.id}: only cli prints and exits; return a value, raise an error"))
        if isinstance(node, ast.Attribute) and dotted(node) in EXITS | STREAMS:
            found.append((node.lineno, f"uses {dotted(node)}: only cli prints and exits"))
    return [f"{module}:{line}: {what}" for line, what in sorted(set(found))]


def file_of(name: str, modules: frozenset[str]) -> str | None:
    """The module that a dotted name of the package is in: `delta.compute.f` -> `delta.compute`, None for others'."""
    if name.split(".")[0] != PACKAGE:
        return None
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for module in (".".join(parts[:length]), ".".join([*parts[:length], "__init__"])):
            if module in modules:
                return module
    return "__init__"


def hides(node: ast.AST) -> bool:
    """Whether what stands in a node does not run, or not at import."""
    conditional = isinstance(node, ast.If) and dotted(node.test).split(".")[-1] == "TYPE_CHECKING"
    return conditional or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def files_imported(sources: dict[str, str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What every module imports of the others, as `(all, hidden)`; hidden: in a function or under TYPE_CHECKING."""
    modules = frozenset(sources)
    everything: dict[str, set[str]] = {module: set() for module in modules}
    hidden: dict[str, set[str]] = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        found = {file_of(name, modules) for _, name in imported(module, tree)} - {None, module}
        everything[module] = {name for name in found if name is not None}
        inside = (name for node in ast.walk(tree) if hides(node) for _, name in imported(module, node))
        if names := {file for name in inside if (file := file_of(name, modules)) not in (None, module)}:
            hidden[module] = names
    return everything, hidden


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of a graph, first node again at the end; empty where there is none."""
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph[node]):
            if found := follow(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := follow(node, []))), [])


def file_violations(sources: dict[str, str]) -> list[str]:
    """Imports of ours in functions or for types alone, and a circle of the others."""
    everything, hidden = files_imported(sources)
    found = [
        f"{module}: imports {name} in a function or for types alone; do so at the top"
        for module, names in sorted(hidden.items())
        for name in sorted(names)
    ]
    if path := circle(everything):
        found.append("a circle of imports: " + " -> ".join(path))
    return found


MODULES = sorted(ROOT.rglob("*.py"))


def test_files_import_one_another_at_their_top_and_in_no_circle():
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in MODULES}
    assert file_violations(sources) == []


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"plan": "from .losses import f", "losses": "from .plan import g"}, "losses -> plan -> losses"),
        ({"plan": "from . import losses", "losses": "import peft_moe_delta.plan"}, "losses -> plan -> losses"),
        (
            {
                "tuner.__init__": "from .layer import L",
                "tuner.layer": "from .model import M",
                "tuner.model": "from . import X",
            },
            "tuner.__init__ -> tuner.layer -> tuner.model -> tuner.__init__",
        ),
        ({"plan": "def f():\n    from .losses import g", "losses": ""}, "plan: imports losses in a function"),
        (
            {"plan": "class C:\n    async def f(self):\n        from . import losses", "losses": ""},
            "imports losses in a",
        ),
        ({"plan": "if TYPE_CHECKING:\n    from .losses import g", "losses": ""}, "plan: imports losses"),
        ({"plan": "if t.TYPE_CHECKING:\n    from .losses import g", "losses": ""}, "plan: imports losses"),
        ({"plan": "def f():\n    import_module('peft_moe_delta.losses')", "losses": ""}, "plan: imports losses"),
        ({"plan": "def f():\n    from .losses import g", "losses": "from .plan import f"}, "losses -> plan -> losses"),
    ],
)
def test_planted_circles_and_hidden_imports_are_found(sources, message):
    assert message in "\n".join(file_violations(sources))


def test_imports_that_go_one_way_are_allowed_and_others_libraries_may_be_imported_late():
    sources = {"plan": "from .losses import f\nimport torch", "losses": "def g():\n    import torch"}
    assert file_violations(sources) == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_keeps_to_its_level(path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from .tuner import MoeDeltaTuner"),
        ("plan", "from . import tuner"),
        ("plan", "import peft_moe_delta.tuner.base"),
        ("plan", "from peft_moe_delta.tuner.base import MoeDeltaTuner"),
        ("tuner.base", "from ..model import MoeDeltaModel"),
        ("graft.memory", "from ..model import MoeDeltaModel"),
        ("plan", "from .losses import load_balancing_loss"),
        ("plan", "def lazily():\n    from .routing import base"),
        ("plan", "importlib.import_module('peft_moe_delta.routing')"),
        ("plan", "from . import ExpertPlan"),
        ("plan", "import peft_moe_delta"),
        ("routing.base", "from ..export import mixtral"),
        ("routing.base", "from ..graft import weights"),
        ("routing.__init__", "from ..graft import weights"),
        ("recipe", "from .cli import main"),
        ("tensors", "import torch, transformers"),
        ("tensors", "from peft.utils import get_peft_model_state_dict"),
        ("checkpoint", "from transformers.utils import SAFE_WEIGHTS_NAME"),
        ("training", "print('loss')"),
        ("training", "write = print"),
        ("training", "import sys\nsys.exit(1)"),
        ("training", "from sys import exit"),
        ("training", "raise SystemExit(1)"),
        ("training", "import sys\nsys.stderr.write('loss')"),
        ("tuner.base", "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING"),
        ("tuner.base", "from peft import PEFT_TYPE_TO_TUNER_MAPPING"),
        ("tuner.base", "import peft\npeft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"),
        ("tuner.base", "import peft\npeft.PEFT_TYPE_TO_CONFIG_MAPPING"),
        ("utils", "import json"),
    ],
)
def test_checker_finds(module, source):
    assert violations(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("languages", "from .errors import LanguageError"),
        ("plan", "from peft_moe_delta.languages import ORIGINAL_GROUP"),
        ("routing.language", "from .base import Routing\nfrom ..errors import PlanError"),
        ("routing.__init__", "from .base import Routing"),
        ("tuner.base", "from peft.tuners.tuners_utils import BaseTuner\nfrom .. import plan, routing"),
        ("registration", "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING"),
        ("cli", "import sys\nfrom .recipe import read\nprint('done')\nsys.exit(0)"),
        ("graft.weights", "import torch\nfrom ..checkpoint import CheckpointReader"),
        ("__init__", "from .cli import main\nfrom .model import MoeDeltaModel"),
    ],
)
def test_checker_allows(module, source):
    assert violations(module, source) == []
