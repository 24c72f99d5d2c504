"""Routing by context: scores from counts, evidence over the last tokens, what a cache remembers."""

import itertools
import math

import pytest
import torch
from transformers import DynamicCache

from chance import shifted
from peft_moe_delta.routing.context import CLIP, MARGIN, THRESHOLD, UNITS, TokenMemory, recognise, token_scores

V, MEMORY = 50, 8


def counts_of(*texts):
    return torch.stack([torch.bincount(torch.tensor(text), minlength=V) for text in texts]).int()


@pytest.fixture
def counts():
    """An original language on tokens 0 to 19, others on 15 to 34 and 30 to 44; nobody uses 45 to 49."""
    generator = torch.Generator().manual_seed(shifted())
    ranges = [(0, 20), (15, 35), (30, 45)]
    return counts_of(*(torch.randint(*limits, (2000,), generator=generator).tolist() for limits in ranges))


def test_scores_are_what_the_formula_says(counts):
    """Computed anew, number by number, in Python's own floats."""
    scores = token_scores(counts, [True, False, False])
    assert scores.dtype == torch.int8 and scores.shape == (V, 2)
    rows = counts.tolist()

    def log_p(language, token):
        row = rows[language]
        kinds = sum(n > 0 for n in row)
        return math.log((row[token] + kinds / V) / (sum(row) + kinds))

    for column, language in enumerate((1, 2)):
        entropy = -sum(n / sum(rows[language]) * log_p(language, t) for t, n in enumerate(rows[language]))
        for token in range(V):
            other = math.log(math.exp(log_p(0, token)) + math.exp(-entropy - MARGIN))
            score = max(-CLIP, min(CLIP, log_p(language, token) - other))
            assert abs(score * UNITS - scores[token, column].item()) <= 0.5 + 1e-9


def test_a_special_token_says_nothing_and_one_of_no_text_speaks_against_all(counts):
    before = token_scores(counts, [True, False, False])
    assert before[45:].lt(0).all()
    counts[:, 45:47] = -1
    scores = token_scores(counts, [True, False, False])
    assert scores[45:47].eq(0).all()
    assert torch.equal(scores[:45], before[:45]) and torch.equal(scores[47:], before[47:])


def test_a_language_that_joins_leaves_the_scores_of_the_others(counts):
    before = token_scores(counts[:2], [True, False])
    assert torch.equal(token_scores(counts, [True, False, False])[:, 0], before[:, 0])


def test_without_an_original_language_typicality_alone_decides(counts):
    scores = token_scores(counts[1:], [False, False])
    ids = torch.tensor([[*range(15, 25), *[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]])
    assert recognise(ids, scores, MEMORY, THRESHOLD)[0, 9] == 1
    assert scores[20, 0] > 0 > scores[40, 0]


def test_evidence_is_a_bounded_sum_over_the_last_tokens_of_the_document():
    """By hand: loops over positions, with document starts, earlier tokens, padding and ids beyond the scores."""

    def evidence(told):
        found = 0
        for score in told:
            found = min(30 * UNITS, max(-15 * UNITS, found + score))
        return found

    generator = torch.Generator().manual_seed(shifted(1))
    scores = torch.randint(-50, 65, (V, 3), generator=generator).to(torch.int8)
    ids = torch.randint(-1, V + 3, (4, 40), generator=generator)
    starts = torch.rand(4, 40, generator=generator) < 0.1
    earlier = torch.randint(0, V, (4, 11), generator=generator)
    ways = itertools.product((1, MEMORY, 11, 100), ((None, None), (earlier, None), (None, starts), (earlier, starts)))
    for memory, (before, begins) in ways:
        found = recognise(ids, scores, memory, THRESHOLD, before, begins)
        for row in range(4):
            text = [] if before is None else before[row].tolist()
            for place, token in enumerate(ids[row].tolist()):
                if begins is not None and begins[row, place]:
                    text = []
                text.append(token)
                sums = [evidence(int(scores[t, c]) for t in text[-memory:] if 0 <= t < V) for c in range(3)]
                best = max(range(3), key=sums.__getitem__)
                assert found[row, place] == (best + 1 if sums[best] > THRESHOLD else 0)


def test_token_by_token_is_one_pass_exactly(counts):
    scores = token_scores(counts, [True, False, False])
    ids = torch.randint(0, V, (3, 60), generator=torch.Generator().manual_seed(shifted(2)))
    at_once, cache = recognise(ids, scores, MEMORY, THRESHOLD), DynamicCache()
    for part in ids.split([1, 1, 5, 20, 1, 32], dim=1):
        earlier = TokenMemory.of(cache)
        found = recognise(part, scores, MEMORY, THRESHOLD, None if earlier is None else earlier.ids_BS)
        TokenMemory.extend(cache, part)
        assert torch.equal(
            found, at_once[:, TokenMemory.of(cache).get_seq_length() - part.shape[1] :][:, : part.shape[1]]
        )


def test_text_that_changes_its_language_is_followed_within_the_memory(counts):
    scores = token_scores(counts, [True, False, False])
    generator = torch.Generator().manual_seed(shifted(3))
    parts = [torch.randint(*limits, (40,), generator=generator) for limits in ((0, 15), (35, 45), (20, 30), (0, 15))]
    found = recognise(torch.cat(parts)[None], scores, MEMORY, THRESHOLD)[0]
    for part, language in enumerate((0, 2, 1, 0)):
        assert found[part * 40 + MEMORY - 1 : part * 40 + 40].eq(language).all()


def test_what_a_cache_remembers_goes_where_keys_go():
    cache = DynamicCache()
    keys = torch.zeros(3, 2, 6, 4)
    cache.update(keys, keys, 0)
    ids = torch.arange(18).view(3, 6)
    TokenMemory.extend(cache, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(TokenMemory.of(cache).ids_BS, ids[[2, 0, 0]])
    cache.crop(-2)
    assert torch.equal(TokenMemory.of(cache).ids_BS, ids[[2, 0, 0], :4])
    cache.batch_repeat_interleave(2)
    assert len(TokenMemory.of(cache).ids_BS) == 6
    cache.reset()
    assert TokenMemory.of(cache).ids_BS is None
