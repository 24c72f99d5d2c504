"""`make fuzz`: thousands of bad values, counted. Ends with exit status 1 if one gave a traceback or cost a file.

python -m fuzz --number 1000 --seed 0 config recipes command_line
"""

from __future__ import annotations

import argparse
import sys

from fuzz import everything

parser = argparse.ArgumentParser()
parser.add_argument("subjects", nargs="*", default=list(everything.SUBJECTS), help="which; default: all")
parser.add_argument("--number", type=int, default=1000, help="of inputs a subject")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
total = everything.run(arguments.subjects, arguments.number, arguments.seed, report=print)
sys.exit(bool(total.tracebacks or total.lost))
