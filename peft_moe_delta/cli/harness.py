"""`peft-moe-delta-lm-eval`: lm-evaluation-harness's own command line with our model in it.

`lm_eval` finds models in a table of its own and has no plug-ins, so this program enters ours and hands over; arguments
and output are `lm_eval`'s. No other module imports this one: `lm_eval` need not be installed, and takes long to import.
"""

from __future__ import annotations

import sys

try:
    from lm_eval.__main__ import cli_evaluate

    from ..evaluation import harness  # noqa: F401  # registers the model

    _missing = None
except ImportError as error:
    _missing = str(error)


def lm_eval_main() -> None:
    """Everything after the program's name is for `lm_eval`, which now knows `--model moe_delta`."""
    if _missing is not None:
        sys.exit(f"error: lm-evaluation-harness is not installed ({_missing}). pip install 'peft-moe-delta[lm-eval]'")
    cli_evaluate()
