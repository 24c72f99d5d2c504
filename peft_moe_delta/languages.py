"""Languages: what codes mean, and the ids and groups of an adapter's languages.

In: the user's mapping from language code to group name. Out: `LanguageTable`, which turns codes into the ids that
batches carry and ids into the group indices that routers use. Ids and group indices follow explicit lists, which the
PEFT config saves; a mapping's own order is never trusted again once they exist (PEFT saves its JSON with sorted keys).

An adapter spells its languages as its user does. Where codes of another origin come in (a benchmark's task names, a
language identifier, the Hub), `read_code` and `closest_code` say which of them mean the same language, whether written
in BCP 47 or ISO 639-1, -2 or -3, with or without script and region.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import langcodes
from langcodes.data_dicts import MACROLANGUAGES

from .errors import LanguageError

ORIGINAL_GROUP = "original"
"""The reserved group of the languages the base model speaks. It owns expert 0, the base MLP, and nothing else."""

PADDING_LANGUAGE_ID = -100
"""The id of tokens that belong to no language: padding."""


_UNQUOTED = {False: "`no`, `off` or `false`", True: "`yes`, `on` or `true`", None: "`~` or `null`"}
_SAME_SCRIPT = {"Hang": "Kore", "Aran": "Arab"}  # FLORES writes kor_Hang where BCP 47 has Kore
_ANY_SCRIPT = "Hani"  # cmn_Hani is Chinese in traditional or simplified characters
_LANGUAGE_SUBTAG = re.compile(r"[a-z]{2,3}")


@lru_cache(maxsize=4096)
def read_code(code: str) -> langcodes.Language | None:
    """What a code means, in one form for all standards: `hun`, `hu_HU`, `hun_Latn` -> language `hu`; `iw` -> `he`;
    `arb` -> `ar`. None for a name that is no code of a language, such as a domain's."""
    try:
        tag = langcodes.get(code.strip().replace("_", "-")).prefer_macrolanguage()
    except ValueError:
        return None
    if tag.language is None or not tag.is_valid():
        return None
    script = None if tag.script in (None, _ANY_SCRIPT) else _SAME_SCRIPT.get(tag.script, tag.script)
    return tag.update_dict({"script": script})


def script_of(code: str) -> str | None:
    """The script a language is written in (ISO 15924): the one its code states, else the usual one. None if no code."""
    tag = read_code(code)
    if tag is None:
        return None
    usual = tag.maximize()
    if usual.script == "Latn" and not tag.script and (wider := _wider(tag)):
        usual = langcodes.get(wider).maximize()  # Latin is also what is said of languages that nothing is known of
    return usual.script


def closest_code(code: str, known: Iterable[str]) -> str | None:
    """Which of the `known` codes means the language of `code`, whatever standards they are written in.

    The language must be the same, or one the individual language and the other its macrolanguage (`nb`, `no`); two
    stated scripts must agree, so that `zho_Hant` is never `zh-Hans`. Of several the nearest script and region wins:
    `pt-BR` is `pt` before it is `pt-PT`. None where none fits.
    """
    known = list(known)
    if code in known:
        return code
    wanted = read_code(code)
    if wanted is None:
        return None
    fitting = [
        (langcodes.tag_distance(wanted, tag), place)
        for place, other in enumerate(known)
        if (tag := read_code(other)) is not None and _is_same_language(wanted, tag)
    ]
    return known[min(fitting)[1]] if fitting else None


def closest_code_in_name(name: str, known: Iterable[str]) -> str | None:
    """Which of the `known` codes a name such as a task's ends in: `belebele_hun_Latn`, `arc_hu`, `mmlu_pt-BR`; of a
    translation's the target, `flores_en-hu`. None where it names none of them."""
    known, parts = list(known), re.split(r"[_-]", name)
    subtags: list[str] = []  # what follows a language in the name, and may be its script and region
    for part in reversed(parts):
        if _LANGUAGE_SUBTAG.fullmatch(part):
            code = "-".join([part, *subtags])
            if (found := closest_code(code if read_code(code) else part, known)) is not None:
                return found
        tag = "-".join(["und", part, *subtags])
        valid = re.fullmatch(r"[A-Za-z]{4}|[A-Za-z]{2}|\d{3}", part) and langcodes.tag_is_valid(tag)
        subtags = [part, *subtags] if valid else []
    return None


def _is_same_language(one: langcodes.Language, other: langcodes.Language) -> bool:
    if one.language != other.language:
        if other.language != _wider(one) and one.language != _wider(other):
            return False
        return script_of(str(one)) == script_of(str(other))
    stated = [tag.maximize().script for tag in (one, other) if tag.script or tag.territory]
    return len(set(stated)) < 2


def _wider(tag: langcodes.Language) -> str | None:
    """The macrolanguage of a language that has no two-letter code of its own; and Norwegian of its written forms.
    Indonesian (`id`) and Serbian (`sr`) have macrolanguages too, and yet are languages of their own to everyone."""
    code = tag.language or ""
    return MACROLANGUAGES.get(code) if len(code) == 3 or code in ("nb", "nn") else None


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
                hint = (
                    f" In YAML, {_UNQUOTED[code]} without quotes is no text: write it in quotes."
                    if code is None or isinstance(code, bool)
                    else ""
                )
                raise LanguageError(
                    f"`languages` must map language codes to group names, both non-empty strings, one group a "
                    f"language; got {code!r}: {group!r}.{hint}"
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
            same = closest_code(code, self.codes) if isinstance(code, str) else None
            advice = f"{code!r} is called {same!r} here: use that" if same else "Use one of them"
            raise LanguageError(
                f"Unknown language {code!r}; known languages: {', '.join(self.codes)}. "
                f"{advice}, or add the language to the config's `languages`."
            ) from None

    def members(self, group: str) -> tuple[str, ...]:
        """The languages of a group, in id order."""
        index = self.groups.index(group)
        return tuple(code for code, g in zip(self.codes, self.group_of, strict=True) if g == index)
