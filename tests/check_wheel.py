"""Build the wheel, install it in an empty environment with the pinned versions, and use it from another folder.

Run by `make wheel-test` with the development environment's Python, which has `build`. Not a test module: it takes
a minute or two and needs the package index, so pytest does not collect it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "peft_moe_delta"
OUTPUT = REPOSITORY / "build" / "wheel"

# Run in the new environment: the installed package is the wheel's, and all that its index promises is there.
USE = f"""
import pathlib, sys
import {PACKAGE} as package
folder = pathlib.Path(package.__file__).resolve().parent
assert folder.is_relative_to(pathlib.Path(sys.prefix).resolve()), folder
missing = [name for name in package.__all__ if not hasattr(package, name)]
assert not missing, missing
print(f"imported {{len(package.__all__)}} public names")
"""


def build() -> Path:
    """The wheel, built in an environment of its own, as an installer would."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(OUTPUT), str(REPOSITORY))
    (wheel,) = OUTPUT.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The package's files and nothing else: every tracked or new file under it, and the licence."""
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    if packed != expected:
        sys.exit(f"{wheel.name} differs from {PACKAGE}/: {sorted(packed ^ expected)}")
    if not any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist()):
        sys.exit(f"{wheel.name} holds no LICENSE")


def install_and_use(wheel: Path, folder: Path) -> None:
    """Install in an empty environment in `folder`; import and call the command from there, not from the repository."""
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = (str(binaries / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--constraint", str(REPOSITORY / "constraints.txt"), str(wheel), cwd=folder)
    run(*pip, "check", cwd=folder)
    run(str(binaries / "python"), "-c", USE, cwd=folder)
    run(str(binaries / "peft-moe-delta"), "--help", cwd=folder)
    run(str(binaries / "python"), "-m", PACKAGE, "--version", cwd=folder)


def run(*command: str, cwd: Path | None = None) -> None:
    """Run a command without what this process's environment would let leak in; stop here if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    print("+", " ".join(command), flush=True)
    if code := subprocess.run(command, cwd=cwd, env=environment, check=False).returncode:
        sys.exit(code)


def main() -> None:
    wheel = build()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        install_and_use(wheel, Path(folder))
    print(f"{wheel.name}: installs and imports from an empty environment")


if __name__ == "__main__":
    main()
