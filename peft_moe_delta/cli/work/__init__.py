"""What the commands do: a module for each of the declaring ones, imported when one of its commands has work to do.

A function takes what its command has read and returns what is printed. PEFT knows the tuner before any of it begins,
as after `import peft_moe_delta`, which the command line puts off.
"""

from ...registration import register

register()
