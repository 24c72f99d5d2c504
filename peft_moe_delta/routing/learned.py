"""Learned routing (MoE-LPR, arXiv 2408.11396): every token may use every expert of the layer; no language is needed."""

from .base import Routing


class LearnedRouting(Routing):
    """All experts for everyone; the router decides."""

    name = "learned"
    needs_language = False

    def allowed_experts(self, counts: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
        return ((True,) * sum(counts),) * len(counts)
