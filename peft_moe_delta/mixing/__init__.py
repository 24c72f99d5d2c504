"""Mixtures of dense models that were specialised apart from each other, one a language (BTX, BAM, DUME).

- `mix`: a seed and its branches, dense checkpoints, become one upcycled model
- `fit_routers`: routers and gates in closed form, from labelled text, without a gradient step; of a mixture, or of any
  adapter: after growing, those of what is new alone
"""

from .branches import mix, mixture_config
from .routers import EARLIER_WEIGHT, fit_routers
from .statistics import RouterStatistics

__all__ = ["EARLIER_WEIGHT", "RouterStatistics", "fit_routers", "mix", "mixture_config"]
