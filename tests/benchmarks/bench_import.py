"""What `import peft_moe_delta` costs beyond importing peft: the median over fresh processes, taken in one run.

Each process imports peft, then this package, and times both, so the difference needs no second process.
The first process is not counted: it reads files that the others find in the disk cache.
"""

import argparse
import statistics
import subprocess
import sys

LIMIT_SECONDS = 0.3

SCRIPT = """
import time
start = time.perf_counter()
import peft
between = time.perf_counter()
import peft_moe_delta
print(between - start, time.perf_counter() - between)
"""


def time_once() -> tuple[float, float]:
    """Seconds for peft, and for this package after it, in a process of their own."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], check=True, stdout=subprocess.PIPE, text=True)
    peft, ours = map(float, result.stdout.split()[-2:])
    return peft, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=7, help="how many fresh processes to time")
    processes = parser.parse_args().processes
    time_once()
    peft, ours = zip(*(time_once() for _ in range(processes)), strict=True)
    print(f"{processes} fresh processes      median      min      max")
    for label, seconds in (("import peft", peft), ("then peft_moe_delta", ours)):
        print(f"{label:<22} {statistics.median(seconds):7.3f}s {min(seconds):7.3f}s {max(seconds):7.3f}s")
    cost = statistics.median(ours)
    verdict = "within" if cost < LIMIT_SECONDS else "OVER"
    print(f"added: {cost:.3f}s, {cost / statistics.median(peft):.1%} of peft, {verdict} the limit of {LIMIT_SECONDS}s")


if __name__ == "__main__":
    main()
