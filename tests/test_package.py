"""The package as a user finds it: typed, with a short public index in which every name is there."""

import importlib.resources

import peft_moe_delta

MOST_PUBLIC_NAMES = 26


def test_says_that_it_is_typed():
    assert importlib.resources.files(peft_moe_delta).joinpath("py.typed").is_file()


def test_public_names_are_few_and_listed_once():
    names = peft_moe_delta.__all__
    assert len(names) == len(set(names))
    assert 0 < len(names) <= MOST_PUBLIC_NAMES


def test_every_public_name_resolves():
    assert [name for name in peft_moe_delta.__all__ if not hasattr(peft_moe_delta, name)] == []


def test_star_import_gives_exactly_the_public_names():
    namespace: dict[str, object] = {}
    exec("from peft_moe_delta import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(peft_moe_delta.__all__)
