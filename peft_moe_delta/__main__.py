"""`python -m peft_moe_delta`, which is `peft-moe-delta`."""

from .cli import main

if __name__ == "__main__":
    main()
