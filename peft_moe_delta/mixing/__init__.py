"""Mixtures of dense models that were specialised apart from each other, one a language (BTX, BAM, DUME).

- `mix`: a seed and its branches, dense checkpoints, become one upcycled model
- `fit_routers`: its routers in closed form, from labelled text, without a gradient step
"""

from .branches import mix
from .routers import RouterStatistics, fit_routers

__all__ = ["RouterStatistics", "fit_routers", "mix"]
