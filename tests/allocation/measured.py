"""Statistics small enough to work out by hand."""

import numpy as np

from peft_moe_delta.allocation import LanguageStatistics

STATISTICS = LanguageStatistics(
    languages=("en", "hu", "el"),
    layers=(0, 1),
    grams={
        "similarity": np.array(
            [[[0.9, 0.1, 0.3], [0.1, 0.8, 0.2], [0.3, 0.2, 0.7]], [[0.9, 0.5, 0.5], [0.5, 0.8, 0.4], [0.5, 0.4, 0.7]]]
        ),
        "deviation": np.array(
            [[[4.0, 2.0, 0.0], [2.0, 4.0, 1.0], [0.0, 1.0, 1.0]], [[9.0, 3.0, 1.0], [3.0, 16.0, 2.0], [1.0, 2.0, 4.0]]]
        ),
    },
    model={"name": "made up", "expert_params": 110, "hidden_size": 10},
    settings={"similarity": {"tokens": 5}},
)
"""Three languages in two layers. Norms of the deviation: en 2 3, hu 2 4, el 1 2."""
