"""Who may serve a token.

- `base`: `Routing`, the rule's interface; `choose_experts`, the top-k choice; `Routes`, its result
- `learned`: every expert of the layer (MoE-LPR)
- `language`: the experts of the token's language group (X-MOD, DMoE)
- `growth`: what a rule allows to groups that were there before others came
"""

from ..errors import PlanError
from .base import Routes, Routing, choose_experts
from .growth import within_reach
from .language import LanguageRouting
from .learned import LearnedRouting

ROUTINGS: dict[str, Routing] = {routing.name: routing for routing in (LearnedRouting(), LanguageRouting())}


def routing_named(name: str) -> Routing:
    """The routing of that name.

    Raises:
        PlanError: there is none; the message lists them.
    """
    if name not in ROUTINGS:
        raise PlanError(f"Unknown routing {name!r}; expected one of: {', '.join(ROUTINGS)}.")
    return ROUTINGS[name]


__all__ = [
    "ROUTINGS",
    "LanguageRouting",
    "LearnedRouting",
    "Routes",
    "Routing",
    "choose_experts",
    "routing_named",
    "within_reach",
]
