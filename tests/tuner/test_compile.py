"""An upcycled model under torch.compile."""

import pytest
import torch

from builders import logits, pico, token_batch, upcycle


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["learned", "language"])
def test_compiled_equals_eager(routing):
    torch.compiler.reset()
    model = upcycle(pico(), trained=True, routing=routing)
    compiled = torch.compile(model, backend="aot_eager")
    for ids in (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 3]), torch.tensor([1, 1, 1])):
        expected = logits(model, token_batch(), language_ids=ids)
        torch.testing.assert_close(logits(compiled, token_batch(), language_ids=ids), expected, atol=1e-5, rtol=0)
