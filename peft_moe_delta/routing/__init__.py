"""Who may serve a token.

- `base`: `Routing`, the rule's interface; `router_logits` and `choose_experts`, the top-k choice; `Routes`, its result
- `learned`: every expert of the layer (MoE-LPR)
- `language`: the experts of the token's language group (X-MOD, DMoE)
- `context`: the same, of the language that the text so far is in
- `classifier`: every expert, but expert 0 alone for what a gate takes for an original language (LayerMoE)
- `growth`: what a rule allows to groups that were there before others came
"""

from ..errors import PlanError
from .base import Routes, Routing, choose_experts, router_logits
from .classifier import ClassifierRouting, classifier_logits, most_similar_layers, recognised
from .context import ContextRouting
from .growth import within_reach
from .language import LanguageRouting
from .learned import LearnedRouting

ROUTINGS: dict[str, Routing] = {
    routing.name: routing for routing in (LearnedRouting(), LanguageRouting(), ContextRouting(), ClassifierRouting())
}


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
    "ClassifierRouting",
    "ContextRouting",
    "LanguageRouting",
    "LearnedRouting",
    "Routes",
    "Routing",
    "choose_experts",
    "classifier_logits",
    "most_similar_layers",
    "recognised",
    "router_logits",
    "routing_named",
    "within_reach",
]
