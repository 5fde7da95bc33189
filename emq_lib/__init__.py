"""The thin library under the book: what touches a network or a table, and nothing else.

What a visitor needs is here by name, and is imported when it is first used::

    from emq_lib import Bench, choose_bits, quantize_model, save_network, load_network, save_onnx
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emq_lib.bench.table import Bench
    from emq_lib.quantization.choose import choose_bits
    from emq_lib.quantization.onnx_export import save_onnx
    from emq_lib.quantization.packed import load_network, save_network
    from emq_lib.quantization.quantize import quantize_model

__version__ = "0.1.0"
__all__ = ["Bench", "choose_bits", "load_network", "quantize_model", "save_network", "save_onnx"]

_HOMES = {
    "Bench": "emq_lib.bench.table",
    "choose_bits": "emq_lib.quantization.choose",
    "load_network": "emq_lib.quantization.packed",
    "quantize_model": "emq_lib.quantization.quantize",
    "save_network": "emq_lib.quantization.packed",
    "save_onnx": "emq_lib.quantization.onnx_export",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562), so that `import emq_lib` itself takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
