"""Which layer of a network gets how many bits: patterns over layer names, checked and shown before anything runs.

Explained in chapter 05.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from emq_lib.core.checks import bit_width
from emq_lib.core.costs import weight_bytes
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.graphs import describe_layers

_PASSIVE = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Plan:
    """What is to be done to each layer.

    Attributes:
        layers: columns name, kind, parameters, bits, rule (the pattern that gave them, "ends" or "default").
        kept: (name, reason) of what stays in floating point.
        activation_bits: width of every quantized layer's input.
    """

    layers: pd.DataFrame
    kept: tuple[tuple[str, str], ...]
    activation_bits: int

    @property
    def bits(self) -> dict[str, int]:
        """Layer name -> bits, in forward order."""
        return dict(zip(self.layers["name"], self.layers["bits"].tolist(), strict=True))

    def __str__(self) -> str:
        """Return the plan as a table, the total size, and what stays in floating point."""
        table = self.layers[["name", "kind", "parameters", "bits", "rule"]].to_string(index=False)
        packed = sum(weight_bytes(row.parameters, row.bits) for row in self.layers.itertuples())
        exact = 4 * int(self.layers["parameters"].sum())
        lines = [table, f"weights: {packed:,} bytes packed, {exact:,} in floating point"]
        lines += [f"inputs of these layers: {self.activation_bits} bits"]
        return "\n".join(lines + [f"left in floating point: {name} ({reason})" for name, reason in self.kept])


def plan_bits(
    model: nn.Module,
    example: torch.Tensor,
    *,
    bits: Mapping[str, int] | None = None,
    default: int = 3,
    ends: int | None = 8,
    activation_bits: int = 8,
) -> Plan:
    """Plan a network's bits by patterns over the names of its layers.

    Args:
        model: any network whose convolutions and linear layers run once in a pass.
        example: an input of one image, shape (1, C, H, W); it stays as it is.
        bits: pattern (``*``, ``?`` and ``[...]`` as in file names) -> width. A layer may match one pattern only. The
            name of a layer means that layer, whatever is in it.
        default: width of layers that no pattern matches.
        ends: width of the first and the last layer where no pattern matches them; None: they are like the others.
        activation_bits: width of every quantized layer's input.

    Returns:
        The plan. Layers of other kinds stay in floating point, and the plan names them.

    Raises:
        InvalidBitsError: a width that is no whole number from 1 to 8.
        InvalidParameterError: no network; a pattern that is no text or matches no layer, or a layer that two patterns
            match; both are named.
        UnsupportedModelError: nothing to quantize, a weight that holds NaN or infinity, or see
            :func:`emq_lib.core.graphs.describe_layers`.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> plan_bits(network, torch.zeros(1, 4), bits={"2": 4}).bits
    {'0': 8, '2': 4, '3': 8}
    """
    patterns = _checked_patterns(bits)
    default, activation_bits = bit_width(default, "default"), bit_width(activation_bits, "activation_bits")
    ends = None if ends is None else bit_width(ends, "ends")
    if not isinstance(model, nn.Module):
        raise InvalidParameterError(f"model must be a torch.nn.Module, got {model!r:.60}.")
    training = {module: module.training for module in model.modules()}
    try:
        table = describe_layers(model, example.clone(), pinned={}, tied={})
    finally:
        for module, mode in training.items():
            module.training = mode
    kept = _kept(model, set(table["name"]))
    table = table[~table["name"].isin(kept)].reset_index(drop=True)
    if table.empty:
        raise UnsupportedModelError("The network has no convolution or linear layer that can be quantized.")
    names = list(table["name"])
    _check_weights(model, names)
    matches = {name: [pattern for pattern in patterns if _matches(name, pattern, names)] for name in names}
    if idle := [pattern for pattern in patterns if not any(pattern in found for found in matches.values())]:
        raise InvalidParameterError(f"Patterns that match no layer: {idle}. The layers are {names}.")
    if twice := {name: found for name, found in matches.items() if len(found) > 1}:
        raise InvalidParameterError(f"Layers that more than one pattern matches: {twice}. Make one narrower.")
    widths, rules = [], []
    for name, found in matches.items():
        at_an_end = ends is not None and name in (names[0], names[-1])
        rules.append(found[0] if found else "ends" if at_an_end else "default")
        widths.append(patterns[found[0]] if found else ends if at_an_end else default)
    return Plan(table.assign(bits=widths, rule=rules), tuple(kept.items()), activation_bits)


def _checked_patterns(bits: Mapping[str, int] | None) -> dict[str, int]:
    """Return pattern -> width after checking both."""
    if bits is not None and not isinstance(bits, Mapping):
        raise InvalidParameterError(f"bits must be a dictionary of patterns and widths, got {bits!r:.60}.")
    if odd := [pattern for pattern in bits or {} if not isinstance(pattern, str)]:
        raise InvalidParameterError(f"Patterns must be texts, {odd} are none.")
    return {pattern: bit_width(width, pattern) for pattern, width in (bits or {}).items()}


def _matches(name: str, pattern: str, names: Sequence[str]) -> bool:
    return name == pattern if pattern in names else fnmatch.fnmatchcase(name, pattern)


def _check_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Check that what is to be quantized is finite: rounding would turn NaN into some number."""
    for name in names:
        for part, tensor in model.get_submodule(name).named_parameters(recurse=False):
            if not tensor.isfinite().all():
                raise UnsupportedModelError(f"The {part} of layer {name!r} holds NaN or infinity. Train it again.")


def _kept(model: nn.Module, run: set[str]) -> dict[str, str]:
    """Return name -> reason of the modules with weights that cannot be quantized."""
    kept = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            if name not in run:
                kept[name] = "it does not run in a pass of its own"
        elif any(parameter.ndim > 1 for parameter in own.values()) and not isinstance(module, _PASSIVE):
            kept[name or "the network itself"] = f"{type(module).__name__} with parameters {', '.join(own)}"
    return kept
