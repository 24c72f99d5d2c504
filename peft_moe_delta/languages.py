"""Languages, their ids and their groups.

In: the user's mapping from language code to group name. Out: `LanguageTable`, which turns codes into the ids that
batches carry and ids into the group indices that routers use. Ids and group indices follow explicit lists, which the
PEFT config saves; a mapping's own order is never trusted again once they exist (PEFT saves its JSON with sorted keys).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import LanguageError

ORIGINAL_GROUP = "original"
"""The reserved group of the languages the base model speaks. It owns expert 0, the base MLP, and nothing else."""

PADDING_LANGUAGE_ID = -100
"""The id of tokens that belong to no language: padding."""


@dataclass(frozen=True)
class LanguageTable:
    """Languages in id order and groups in index order; group 0 is always `"original"`.

    Attributes:
        codes: language codes; a language's id is its position. Append-only, so that saved ids stay valid.
        groups: group names; a group's index is its position. `groups[0] == "original"`.
        group_of: group index of each language, by id.
    """

    codes: tuple[str, ...]
    groups: tuple[str, ...]
    group_of: tuple[int, ...]

    @classmethod
    def build(
        cls, languages: Mapping[str, str], codes: Iterable[str] | None = None, groups: Iterable[str] | None = None
    ) -> LanguageTable:
        """Make a table from `{code: group}`, in the order of the saved lists where they are given.

        Raises:
            LanguageError: empty mapping, a code or group that is not a non-empty string, or lists that disagree with
                the mapping.
        """
        if not isinstance(languages, Mapping) or not languages:
            raise LanguageError(
                f"`languages` must map at least one language code to a group; got {languages!r}. "
                'Example: {"en": "original", "hu": "expanded"}.'
            )
        for code, group in languages.items():
            if not isinstance(code, str) or not code or not isinstance(group, str) or not group:
                raise LanguageError(
                    f"`languages` must map language codes to group names, both non-empty strings, one group a "
                    f"language; got {code!r}: {group!r}."
                )
        codes = tuple(languages) if codes is None else tuple(codes)
        if groups is None:
            groups = (ORIGINAL_GROUP, *dict.fromkeys(g for g in languages.values() if g != ORIGINAL_GROUP))
        groups = tuple(groups)
        for name, listed, used in (
            ("languages", codes, set(languages)),
            ("groups", groups, {ORIGINAL_GROUP, *languages.values()}),
        ):
            if len(set(listed)) != len(listed) or set(listed) != used:
                raise LanguageError(
                    f"The saved order of {name} {list(listed)} does not match the mapping's {sorted(used)}. "
                    "Change `languages` only by appending, or remove the saved lists from the config."
                )
        if groups[0] != ORIGINAL_GROUP:
            raise LanguageError(f'The first group must be "{ORIGINAL_GROUP}"; got {list(groups)}.')
        index = {group: i for i, group in enumerate(groups)}
        return cls(codes, groups, tuple(index[languages[code]] for code in codes))

    def id_of(self, code: str) -> int:
        """The id of a language code.

        Raises:
            LanguageError: the code is not in the table; the message lists the known ones.
        """
        try:
            return self.codes.index(code)
        except ValueError:
            raise LanguageError(
                f"Unknown language {code!r}; known languages: {', '.join(self.codes)}. "
                "Use one of them, or add the language to the config's `languages`."
            ) from None

    def members(self, group: str) -> tuple[str, ...]:
        """The languages of a group, in id order."""
        index = self.groups.index(group)
        return tuple(code for code, g in zip(self.codes, self.group_of, strict=True) if g == index)
