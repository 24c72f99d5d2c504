"""`group_languages`: the published groups, the smallest diameters by brute force, and matrices that make no sense."""

import csv
import json
from itertools import combinations, permutations

import numpy as np
import pytest

from peft_moe_delta import LanguageTable, group_languages
from peft_moe_delta.allocation import LanguageGroups
from peft_moe_delta.allocation.cliques import tightest
from peft_moe_delta.errors import DataError, LanguageError


def cosines(number: int, seed: int = 0, clusters: int | None = None) -> np.ndarray:
    """A similarity matrix of random directions; with `clusters`, item i is near direction i % clusters."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(number, 6))
    if clusters:
        vectors = 0.1 * vectors + np.eye(clusters)[np.arange(number) % clusters] @ rng.normal(size=(clusters, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def names(number: int) -> list[str]:
    return [f"l{index}" for index in range(number)]


@pytest.mark.parametrize("number", [2, 3, 6])
def test_published_similarity_gives_the_published_groups_in_order(shared_data, number):
    folder = shared_data.parent / "reference/dmoe"
    header, *rows = csv.reader((folder / "similarity_bloom_560m_last3.csv").read_text().splitlines())
    published = json.loads((folder / f"groups_{number}.json").read_text())
    found = group_languages(np.array(rows, dtype=float), header, num_groups=number, resamples=0)
    assert [set(group) for group in found.groups] == [
        {code for code, group in published.items() if group == index} for index in range(number)
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_exact_search_is_brute_force(seed, size):
    distance = np.round(1 - cosines(9, seed), 1)  # many ties
    best = min(combinations(range(9), size), key=lambda c: distance[np.ix_(c, c)][np.triu_indices(size, 1)].max())
    assert tightest(distance, size) == list(best)  # `min` keeps the first of equals, in lexicographic order


@pytest.mark.parametrize(("number", "groups"), [(10, 3), (18, 5), (7, 7), (5, 1), (23, 4)])
def test_every_language_is_in_one_group_and_sizes_differ_by_at_most_one(number, groups):
    found = group_languages(cosines(number), names(number), num_groups=groups, resamples=3)
    assert sorted(code for group in found.groups for code in group) == sorted(names(number))
    sizes = [len(group) for group in found.groups]
    assert len(sizes) == groups and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("number", "groups", "sizes"), [(10, None, (2, 4)), (11, 3, (1, 5)), (9, None, (1, 3)), (17, None, (5, 6))]
)
def test_sizes_may_differ_within_their_bounds(number, groups, sizes):
    for seed in range(5):
        found = group_languages(cosines(number, seed), names(number), num_groups=groups, sizes=sizes, resamples=2)
        assert sorted(code for group in found.groups for code in group) == sorted(names(number))
        assert all(sizes[0] <= len(group) <= sizes[1] for group in found.groups)
        assert groups is None or len(found.groups) == groups


def test_sizes_follow_clusters_of_different_size():
    similarity = np.eye(7)
    for block in (range(0, 4), range(4, 7)):
        for a, b in combinations(block, 2):
            similarity[a, b] = similarity[b, a] = 0.9 - 0.01 * (a + b)
    found = group_languages(similarity, names(7), sizes=(2, 4), resamples=0)
    assert {frozenset(group) for group in found.groups} == {frozenset(names(7)[:4]), frozenset(names(7)[4:])}


@pytest.mark.parametrize("exact_up_to", [20, 2])
def test_clear_clusters_are_found_exactly_and_greedily_and_are_stable(exact_up_to):
    found = group_languages(cosines(12, clusters=3), names(12), num_groups=3, exact_up_to=exact_up_to)
    assert {frozenset(group) for group in found.groups} == {frozenset(names(12)[i::3]) for i in range(3)}
    assert found.stability > 0.9 > found.chance  # greedily a group may start in too small a cluster
    assert max(found.diameters) < 0.2


def test_noise_is_less_stable_than_clusters_and_the_draws_are_seeded():
    noise = [group_languages(cosines(12, 3), names(12), num_groups=3, seed=seed).stability for seed in (0, 0, 1)]
    assert noise[0] == noise[1]
    assert noise[0] < group_languages(cosines(12, clusters=3), names(12), num_groups=3).stability


def test_ties_fall_to_the_first():
    found = group_languages(np.full((6, 6), 0.5) + 0.5 * np.eye(6), names(6), num_groups=3, resamples=0)
    assert found.groups == (("l0", "l1"), ("l2", "l3"), ("l4", "l5"))
    assert found.diameters == (0.5, 0.5, 0.5)


NORDIC = {frozenset({"no", "sv"}): 0.9, frozenset({"fi", "et"}): 0.9}


@pytest.mark.parametrize("options", [{"num_groups": 3}, {"num_groups": 3, "sizes": (1, 2)}, {"sizes": (1, 2)}])
@pytest.mark.parametrize("exact_up_to", [20, 2])
def test_leftovers_come_last_in_whatever_order_languages_stand(options, exact_up_to):
    for codes in permutations(("no", "fi", "el", "sv", "et")):
        similarity = {a: {b: 1.0 if a == b else NORDIC.get(frozenset({a, b}), 0.0) for b in codes} for a in codes}
        found = group_languages(similarity, **options, exact_up_to=exact_up_to, resamples=0)
        assert {frozenset(group) for group in found.groups[:2]} == set(NORDIC)
        assert found.groups[2:] == (("el",),)


@pytest.mark.parametrize("options", [{"num_groups": 4}, {"num_groups": 4, "sizes": (1, 2)}])
def test_the_one_pair_is_the_closest(options):
    similarity = np.eye(5)
    for a, b, value in ((0, 1, 0.5), (3, 4, 0.9)):
        similarity[a, b] = similarity[b, a] = value
    found = group_languages(similarity, names(5), **options, resamples=0)
    assert found.groups == (("l3", "l4"), ("l0",), ("l1",), ("l2",))


def test_many_languages():
    found = group_languages(cosines(128), names(128), num_groups=10, resamples=5)
    assert [len(group) for group in found.groups] == [13] * 8 + [12] * 2


def test_a_mapping_names_its_languages_and_a_list_picks_some():
    similarity = {
        a: {b: 1.0 if a == b else 0.1 * (len(a) + len(b)) for b in ("x", "yy", "zzz")} for a in ("x", "yy", "zzz")
    }
    assert group_languages(similarity, num_groups=1, resamples=0).groups == (("x", "yy", "zzz"),)
    assert group_languages(similarity, ["zzz", "x"], num_groups=2, resamples=0).groups == (("zzz",), ("x",))


def test_groups_become_the_languages_of_a_config(tmp_path):
    found = group_languages(cosines(4), ["hu", "el", "tr", "az"], num_groups=2, original=["en"])
    languages = found.as_languages()
    assert LanguageTable.build(languages).groups == ("original", "expanded_1", "expanded_2")
    found.save(tmp_path / "groups.json")
    again = LanguageGroups.load(tmp_path / "groups.json")
    assert again.as_languages() == languages and again.table() == found.table()
    np.testing.assert_array_equal(again.similarity, found.similarity)
    with pytest.raises(DataError, match="Not language groups"):
        LanguageGroups.from_json('{"groups": []}')


LOPSIDED = np.array([[1, 0.2, 0], [0.3, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("similarity", "options", "error", "message"),
    [
        (LOPSIDED, {"num_groups": 2}, DataError, "not symmetric: l0-l1 is 0.2, l1-l0 0.3"),
        (np.eye(3)[:2], {"num_groups": 2}, DataError, "got shape \\(2, 3\\)"),
        (np.full((3, 3), np.inf), {"num_groups": 2}, DataError, "finite"),
        (np.eye(1), {"num_groups": 1, "languages": ["hu"]}, LanguageError, "at least two"),
        (np.eye(2), {"num_groups": 1, "languages": ["hu", "hu"]}, LanguageError, "each once"),
        (np.eye(3), {"num_groups": 2, "languages": None}, DataError, "without names"),
        ({"hu": {"hu": 1.0}, "el": {"el": 1.0}}, {"num_groups": 2, "languages": None}, DataError, "every pair"),
        (np.eye(3), {"num_groups": 1, "original": ["l1"]}, LanguageError, "'l1'\\] are to be grouped"),
        (np.eye(3), {}, LanguageError, "Say how to group"),
        (np.eye(3), {"num_groups": 4}, LanguageError, "expected 1 to 3"),
        (np.eye(3), {"sizes": (2, 2)}, LanguageError, "cannot be cut into groups of 2 to 2"),
        (np.eye(3), {"sizes": (2, 1)}, LanguageError, "Widen sizes"),
        (np.eye(3), {"sizes": (1, 2), "num_groups": 1}, LanguageError, "into 1 groups"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_grouped_is_refused(similarity, options, error, message):
    with pytest.raises(error, match=message):
        group_languages(similarity, **{"languages": names(3), **options})
