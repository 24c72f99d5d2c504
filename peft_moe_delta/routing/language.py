"""Routing by language (X-MOD, arXiv 2205.06266; DMoE's first stage, arXiv 2506.12388): a token's group decides."""

from .base import Routing


class LanguageRouting(Routing):
    """Expert 0 for `"original"`, a group's own experts otherwise, expert 0 again where the group has none."""

    name = "language"
    needs_language = True

    def allowed_experts(self, counts: tuple[int, ...]) -> tuple[tuple[bool, ...], ...]:
        table = []
        for group, count in enumerate(counts):
            first = sum(counts[:group]) if count else 0
            own = range(first, first + max(count, 1))
            table.append(tuple(expert in own for expert in range(sum(counts))))
        return tuple(table)
