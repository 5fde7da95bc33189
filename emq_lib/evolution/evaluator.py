"""The scores of genotypes on the statistics of a network.

Explained in chapter 03.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from emq_lib.core.errors import GenotypeSyntaxError, InvalidParameterError
from emq_lib.evolution.genotypes import Genotype, canonical
from emq_lib.evolution.primitives import BINARIES, INPUTS, PAIRS, REDUCTIONS, UNARIES, Tensor
from emq_lib.evolution.programs import element_programs, joined, reduced
from emq_lib.proxies.handmade import added_logit_changes, clado
from emq_lib.proxies.layer_statistics import LayerStatistics, sampled
from emq_lib.proxies.scores import score

REMEMBERED = 400  # values that an evaluator keeps
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Value:
    """Numbers of all layers, one after the other.

    Layers that share their bits have one slot. What is known of a slot, such as its width or the divergence when it
    alone is quantized, counts once, however many layers it has: where it meets what is known of layers, these are added
    up inside each slot first.

    Attributes:
        data: (R, elements), R = B rows, one per bit width, or one row.
        shapes: (C, K) of each layer, (1, 1) of each slot; of pairs, a single (S B, S B).
        counts: elements of each layer, of which C K are seen.
        of: whose numbers these are: "layers", "slots" or "pairs" of slots.
    """

    data: Tensor
    shapes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    of: str = "layers"

    def layers(self) -> list[Tensor]:
        """Return one (R, C, K) per layer."""
        parts = self.data.split([rows * columns for rows, columns in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @staticmethod
    def joined(parts: Sequence[Tensor], counts: Sequence[int] | None = None, of: str = "layers") -> Value:
        """Return the value of one (R, C, K) per layer."""
        shapes = tuple((part.shape[1], part.shape[2]) for part in parts)
        seen = tuple(rows * columns for rows, columns in shapes)
        return Value(torch.cat([part.flatten(1) for part in parts], dim=1), shapes, tuple(counts or seen), of)

    @staticmethod
    def numbers(data: Tensor, of: str = "layers") -> Value:
        """Return the value of one number per layer or slot, (R, L) or (R, S)."""
        return Value(data, ((1, 1),) * data.shape[1], (1,) * data.shape[1], of)


class Evaluator:
    """Computes the scores of genotypes on one study's statistics; a part that was seen before is remembered.

    Args:
        statistics: of L layers in S slots at B choices.
        mode: "corrected", or "released": primitives with the traps of the released code.
        device: where statistics with one number per weight are kept.
        batched: whether the element-wise formulas of a population run in one launch of a kernel; None: on a GPU.

    Raises:
        GenotypeSyntaxError: another mode.
        InvalidParameterError: no statistics, or a device that is not there.
    """

    def __init__(
        self, statistics: LayerStatistics, *, mode: str = "corrected", device: str = "cpu", batched: bool | None = None
    ) -> None:
        if mode not in ("corrected", "released"):
            raise GenotypeSyntaxError(f"unknown mode {mode!r}; there are corrected and released.")
        if not isinstance(statistics, LayerStatistics):
            raise InvalidParameterError(f"an evaluator needs LayerStatistics, got {statistics!r:.80}.")
        self.choices, self.slots = statistics.choices, statistics.slot_count
        self._statistics, self._mode, self._device = statistics, mode, device
        self._batched = device != "cpu" if batched is None else batched
        try:
            self._slot_of = torch.tensor(statistics.slots, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:  # PyTorch has no error of its own for this
            raise InvalidParameterError(f"no device {device!r:.80} here ({error!s:.200}); try 'cpu'.") from error
        self._known: dict[tuple, Value] = {}
        self._inputs: dict[str, Value] = {}
        self._prepared: dict[tuple, Value] = {}

    def prepare(self, genotypes: Sequence[Genotype]) -> None:
        """Compute the element-wise parts of a population's formulas in one launch for each geometry, if batched.

        Raises:
            GenotypeSyntaxError: one is no genotype.
        """
        self._prepared = {}
        if not self._batched or self._mode == "released":
            return
        from emq_lib.evolution.kernels import postfix_means

        groups: dict[tuple, dict[tuple[str, ...], tuple[tuple[str, ...], str]]] = {}
        for genotype in genotypes:
            for key, part in element_programs(genotype).items():
                groups.setdefault(self.input(part[0][0]).shapes, {})[key] = part
        for shapes, parts in groups.items():
            programs = [program for program, _ in parts.values()]
            inputs = {name: self.input(name) for program in programs for name in program if name in INPUTS}
            data = {name: value.data for name, value in inputs.items()}
            means = postfix_means(programs, data, [rows * columns for rows, columns in shapes], self.choices)
            counts = torch.tensor(next(iter(inputs.values())).counts, device=means.device)
            for (key, (_, reduction)), mean in zip(parts.items(), means, strict=True):
                numbers = REDUCTIONS[reduction][1](mean, counts)
                self._prepared[key] = Value.numbers(numbers)

    def scores(self, genotype: Genotype) -> np.ndarray:
        """Return the score table (S, B), or the matrix of pairs (S B, S B) of a formula that ends in one, float64.

        What is known of layers is added up inside each slot. It may hold NaN or infinity, which screening rejects.

        Raises:
            GenotypeSyntaxError: it is no genotype.
        """
        with torch.inference_mode():
            value = self._value(canonical(genotype))
            if value.of == "pairs":
                return value.data.view(value.shapes[0]).double().cpu().numpy()
            numbers = self._means(value)
            rows = numbers.data.double().cpu().numpy()
        table = np.broadcast_to(rows, (len(self.choices), rows.shape[1])).T
        return table.copy() if numbers.of == "slots" else self._statistics.per_slot(table)

    def score(self, genotype: Genotype, configs: np.ndarray) -> np.ndarray:
        """Return the score of each configuration (N, S), shape (N,).

        Raises:
            GenotypeSyntaxError: it is no genotype.
            InvalidScoreError: its scores hold NaN or infinity.
            ConfigLengthError, InvalidBitsError: see :func:`emq_lib.core.costs.choice_indices`.
        """
        return score(self.scores(genotype), configs, self.choices, aggregation=genotype.aggregation)

    def _value(self, genotype: Genotype) -> Value:
        if genotype.structure == "sequential":
            (name,), (chain,) = genotype.inputs, genotype.chains
            return self._batched_chain((name,), reduced(chain)) or self._chain(name, chain)
        if genotype.structure == "branched":
            *branches, last = genotype.chains
            value = self._batched_chain(joined(genotype), reduced(last))
            if value is None:
                one, two = (
                    self._batched_chain((name,), chain) or self._chain(name, chain)
                    for name, chain in zip(genotype.inputs, branches, strict=True)
                )
                value = self._binary(genotype.binary, one, two)
                for unary in last:
                    value = self._unary(unary, value)
            return value
        states = [self.input(name) for name in genotype.inputs]
        for chain in genotype.chains:
            edges = [self._unary(unary, state) for unary, state in zip(chain, states, strict=True)]
            node = edges[0]
            for edge in edges[1:]:
                node = self._binary("sum", node, edge)
            states.append(node)
        nodes = [self._means(node) for node in states[2:]]
        mean = sum(node.data for node in nodes) / len(nodes)
        return replace(nodes[0], data=mean)

    def _batched_chain(self, head: tuple[str, ...], chain: tuple[str, ...]) -> Value | None:
        """Return the value after the unaries from the longest part that :meth:`prepare` computed; None if none."""
        for end in range(len(chain), 0, -1):
            if value := self._prepared.get(head + chain[:end]):
                for unary in chain[end:]:
                    value = self._unary(unary, value)
                return value
        return None

    def _chain(self, name: str, chain: Sequence[str]) -> Value:
        """Return the value after the unaries; every beginning of a chain is remembered."""
        value = self.input(name)
        for end in range(1, len(chain) + 1):
            key = (name, *chain[:end])
            if key not in self._known:
                if len(self._known) >= REMEMBERED:
                    del self._known[next(iter(self._known))]
                self._known[key] = self._unary(chain[end - 1], value)
            value = self._known[key]
        return value

    def _unary(self, name: str, value: Value) -> Value:
        unary = UNARIES[name]
        function = unary.released if self._mode == "released" and unary.released else unary.function
        if unary.result == "element":
            return replace(value, data=function(value.data))
        if value.of != "pairs":
            parts = [function(layer, count) for layer, count in zip(value.layers(), value.counts, strict=True)]
            return Value.joined(parts, value.counts if unary.result == "layer" else None, value.of)
        if unary.result == "number":
            return self._over_others(value, function)
        (matrix,) = value.layers()
        return replace(value, data=function(matrix, value.counts[0]).flatten(1))

    def _over_others(self, value: Value, function: Callable[[Tensor, int], Tensor]) -> Value:
        """Reduce pairs to a number per slot and width: average over the other slot's widths, then reduce.

        A pair stands twice in the matrix, so its entries count twice; on the diagonal stands a slot alone. The sum is
        then the expected score of a slot at a width, whatever the others do.
        """
        choices = len(self.choices)
        matrix = value.data.view(self.slots * choices, self.slots, choices)
        others = 2 * matrix.mean(dim=2)
        own = torch.arange(self.slots, device=matrix.device).repeat_interleave(choices)
        options = torch.arange(len(own), device=matrix.device)
        others[options, own] = value.data.view(value.shapes[0]).diagonal()
        numbers = function(others[:, None, :], self.slots).reshape(self.slots, choices)
        return Value.numbers(numbers.T, "slots")

    def _binary(self, name: str, one: Value, two: Value) -> Value:
        binary = BINARIES[name]
        if (one.of, one.shapes) != (two.of, two.shapes):
            one, two = self._means(one), self._means(two)
        if one.of != two.of:
            one, two = self._slots(one), self._slots(two)
        if binary.result == "element":
            return replace(one, data=binary.function(one.data, two.data))
        parts = [binary.function(x, y) for x, y in zip(one.layers(), two.layers(), strict=True)]
        if one.of == "pairs":
            return replace(one, data=parts[0].flatten(1).expand(1, one.data.shape[1]))
        return Value.joined(parts, of=one.of)

    def _means(self, value: Value) -> Value:
        """Return one number per layer, or per slot of what is known of slots or their pairs."""
        return self._unary("mean", value) if value.of == "pairs" or set(value.shapes) != {(1, 1)} else value

    def _slots(self, value: Value) -> Value:
        """Return one number per slot, those of its layers added up."""
        if value.of == "slots":
            return value
        summed = value.data.new_zeros(len(value.data), self.slots)
        return Value.numbers(summed.index_add_(1, self._slot_of, value.data), "slots")

    def input(self, name: str) -> Value:
        """Return an input's value."""
        if name not in self._inputs:
            self._inputs[name] = self._load(name)
        return self._inputs[name]

    def _load(self, name: str) -> Value:
        statistics = self._statistics
        if len(name) == 2:
            plain = self.input(name[1])
            return replace(plain, data=self._row(self.choices).T * plain.data)
        if name in PAIRS:
            matrix = -clado(statistics) if name == "P" else -added_logit_changes(statistics)
            return Value(self._row(matrix.ravel()), (matrix.shape,), (matrix.size,), "pairs")
        of_slots = {
            "b": lambda: np.repeat([self.choices], self.slots, axis=0),
            "K": lambda: statistics.kl,
            "L": lambda: statistics.loss,
        }
        if name in of_slots:
            return Value.numbers(self._tensor(of_slots[name]()).T, "slots")
        of_layers = {
            "n": lambda: self._row(statistics.parameters),
            "T": lambda: self._row(statistics.trace / statistics.parameters),
            "O": lambda: self._tensor(statistics.output_error).T,
        }
        if name in of_layers:
            return Value.numbers(of_layers[name]())
        return self._elements(name)

    def _elements(self, name: str) -> Value:
        """Return an input that has many numbers per layer."""
        statistics = self._statistics
        tensors: Sequence[Tensor] = {
            "W": lambda: [sampled(w)[None] for w in statistics.weights],
            "E": lambda: [sampled(e) for e in statistics.errors],
            "A": lambda: [a[None] for a in statistics.activations],
            "G": lambda: [g[None] for g in statistics.gradients],
            "V": lambda: [v[None] for v in statistics.virtual_gradients],
            "R": lambda: _in_range([r[None] for r in statistics.positive_gradients]),
            "H": lambda: [h[None] for h in statistics.curvature],
            "C": lambda: [c[None] / (2 * c.shape[1]) ** 0.5 for c in statistics.channel_products],
        }[name]()
        counts = None if name in ("A", "C") else statistics.parameters.tolist()
        return Value.joined([tensor.float().to(self._device) for tensor in tensors], counts)

    def _tensor(self, numbers: np.ndarray | Sequence) -> Tensor:
        return torch.tensor(np.asarray(numbers, dtype=np.float32), device=self._device)

    def _row(self, numbers: np.ndarray | Sequence) -> Tensor:
        """Return numbers as one row, (1, N)."""
        return self._tensor(numbers)[None]


def _in_range(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return float64 tensors in a larger unit where float32 cannot hold their numbers: the same for all layers."""
    largest = max(tensor.abs().max().item() for tensor in tensors)
    if largest <= _LARGEST:
        return tensors
    unit = 2.0 ** (math.ceil(math.log2(largest)) - 32)  # so that there is room for squares and sums
    return [tensor / unit for tensor in tensors]
