"""What the command line takes to start, beyond Python itself: the median over fresh processes, taken in one run.

Help, the version, a misspelt command and a misspelt field of a recipe, each right after a Python that does nothing: so
both meet the same machine. The first of each is not counted: it reads files that others find in the disk cache.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS = 0.5
CASES = {
    "--help": ["--help"],
    "--version": ["--version"],
    "a misspelt command": ["rnu"],
    "a misspelt field": ["run", "recipe.yaml"],
}
RECIPE = "modle: base\noutput: run\n"


def seconds(*arguments: str, folder: str) -> float:
    """What a fresh Python with these arguments takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=7, help="how many fresh processes to time for each case")
    processes = parser.parse_args().processes
    print(f"{processes} fresh processes each, beyond `python -c pass`: median      min      max")
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(RECIPE)
        for label, arguments in CASES.items():
            beyond = []
            for _ in range(processes + 1):
                bare = seconds("-c", "pass", folder=folder)
                beyond.append(seconds("-m", "peft_moe_delta", *arguments, folder=folder) - bare)
            counted = beyond[1:]
            slowest = max(slowest, statistics.median(counted))
            print(f"{label:<46} {statistics.median(counted):7.3f}s {min(counted):7.3f}s {max(counted):7.3f}s")
    verdict = "within" if slowest < LIMIT_SECONDS else "OVER"
    print(f"slowest: {slowest:.3f}s, {verdict} the limit of {LIMIT_SECONDS}s")


if __name__ == "__main__":
    main()
