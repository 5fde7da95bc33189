"""The weight bank: every layer at every width, computed once; a configuration selects from it.

Explained in chapter 01.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from emq_lib.core.checks import bit_choices
from emq_lib.core.costs import choice_indices
from emq_lib.core.errors import ConfigLengthError, UnsupportedModelError
from emq_lib.core.quantizers import QuantizedWeight, quantize


@dataclass(frozen=True)
class WeightBank:
    """Every searchable layer at every choice, and the pinned layers at their width: computed once, then selected from.

    Attributes:
        choices: the B allowed widths.
        searchable: names of the searchable layers in forward order.
        slots: the slot, 0 to S - 1, that each of them takes its bits from; tied layers share one.
        pinned: (name, bits) of the layers outside the search.
        weights: (layer name, bits) -> quantized weight.
    """

    choices: tuple[int, ...]
    searchable: tuple[str, ...]
    slots: tuple[int, ...]
    pinned: tuple[tuple[str, int], ...]
    weights: Mapping[tuple[str, int], QuantizedWeight]

    @classmethod
    def of(cls, weights: Mapping[str, QuantizedWeight]) -> WeightBank:
        """Return the bank that holds one configuration only: each layer at the bits that its weight has.

        Args:
            weights: layer name -> quantized weight, in forward order.

        Raises:
            UnsupportedModelError: there is none.
        """
        if not weights:
            raise UnsupportedModelError("A bank of no weights: the network has no layer to quantize.")
        choices = tuple(sorted({weight.bits for weight in weights.values()}))
        entries = {(name, weight.bits): weight for name, weight in weights.items()}
        return cls(choices, tuple(weights), tuple(range(len(weights))), (), entries)

    @property
    def slot_count(self) -> int:
        """S, the length of a configuration."""
        return max(self.slots) + 1

    def widths(self, config: Sequence[int]) -> dict[str, int]:
        """Return layer name -> bits for one configuration, pinned layers included.

        Raises:
            ConfigLengthError: the configuration does not have S entries, or there are several.
            InvalidBitsError: a width is not among the choices.
        """
        if len(choice_indices(config, self.choices, self.slot_count)) != 1 or np.ndim(config) != 1:
            raise ConfigLengthError(
                f"A bank gives one configuration at a time; got an array of shape {np.shape(config)}."
            )
        return {name: int(config[slot]) for name, slot in zip(self.searchable, self.slots, strict=True)} | dict(
            self.pinned
        )

    def select(self, config: Sequence[int]) -> dict[str, QuantizedWeight]:
        """Return layer name -> quantized weight for one configuration, pinned layers included.

        Raises:
            ConfigLengthError, InvalidBitsError: see :meth:`widths`.
        """
        return {name: self.weights[name, bits] for name, bits in self.widths(config).items()}


def build_weight_bank(model: nn.Module, layers: pd.DataFrame, choices: Sequence[int]) -> WeightBank:
    """Quantize each layer of a folded network at each width it may take.

    Args:
        model: network with folded batch norm.
        layers: its layer table.
        choices: the B allowed widths.

    Raises:
        InvalidBitsError: choices that do not increase, or a width outside 1 to 8.
        UnsupportedModelError: the network has no such layer, or its weight holds NaN or infinity; it is named.
    """
    modules, choices = dict(model.named_modules()), bit_choices(choices)
    if odd := [name for name in layers["name"] if not isinstance(modules.get(name), nn.Conv2d | nn.Linear)]:
        raise UnsupportedModelError(f"The network has no layers {odd}: the layer table is of another network.")
    if odd := [name for name in layers["name"] if not modules[name].weight.isfinite().all()]:
        raise UnsupportedModelError(f"The weights of {odd} hold NaN or infinity, which no grid has.")
    free = layers[layers["searchable"]]
    searchable, slots = tuple(free["name"]), tuple(map(int, free["slot"]))
    pinned = tuple((layer.name, int(layer.pinned_bits)) for layer in layers[~layers["searchable"]].itertuples())
    wanted = [*((name, bits) for name in searchable for bits in choices), *pinned]
    weights = {(name, bits): quantize(modules[name].weight, bits) for name, bits in wanted}
    return WeightBank(choices, searchable, slots, pinned, weights)
