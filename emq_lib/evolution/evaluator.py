"""The scores of genotypes on the statistics of a network.

Explained in chapter 03.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from emq_lib.core.errors import GenotypeSyntaxError
from emq_lib.evolution.genotypes import Genotype, _ends_in_number, canonical
from emq_lib.evolution.primitives import _GEOMETRY, BINARIES, INPUTS, PAIRS, REDUCTIONS, UNARIES, Tensor
from emq_lib.proxies.handmade import added_logit_changes, clado
from emq_lib.proxies.layer_statistics import LayerStatistics, sampled
from emq_lib.proxies.scores import score

REMEMBERED = 400  # values that an evaluator keeps


def element_programs(genotype: Genotype) -> dict[tuple[str, ...], tuple[tuple[str, ...], str]]:
    """Return the parts of a formula that are element-wise up to a reduction, as programs of the kernel.

    A part is the beginning of a chain on an input, or of what follows the binary of two element-wise branches on inputs
    of like geometry. A DAG has none.

    Returns:
        key of the part -> the program in postfix order, and the reduction that its mean stands for, of
        :data:`REDUCTIONS`.

    >>> element_programs(parse("branched(product; bW: no_op; G: no_op; abs, sum)"))
    {('product', 'G', 'no_op', 'bW', 'no_op', 'abs', 'sum'): (('G', 'W', 'times b', 'product', 'abs'), 'sum')}
    """
    short = canonical(genotype)
    if short.structure == "dag":
        return {}
    geometries = [_GEOMETRY.get(name[-1], "weights") for name in short.inputs]
    joined, parts, branches = short.structure == "branched", {}, []
    for name, chain, geometry in zip(short.inputs, short.chains, geometries, strict=False):
        program = (name,) if len(name) == 1 else (name[1], "times b")
        branches.append((*program, *chain))
        if geometry not in ("number", "pairs"):
            parts |= _part((name,), program, chain if joined else _reduced(chain))
    alike = joined and geometries[0] == geometries[1] and geometries[0] not in ("number", "pairs")
    functions = [UNARIES[unary] for chain in short.chains[:-1] for unary in chain]
    if alike and all(one.result == "element" for one in (*functions, BINARIES[short.binary])):
        parts |= _part(_joined(short), (*branches[0], *branches[1], short.binary), _reduced(short.chains[-1]))
    return parts


def _part(
    head: tuple[str, ...], program: tuple[str, ...], chain: tuple[str, ...]
) -> dict[tuple[str, ...], tuple[tuple[str, ...], str]]:
    """Return the beginning of a chain up to its first reduction; nothing if another function looks at whole layers."""
    for end, unary in enumerate(chain):
        if unary in REDUCTIONS:
            steps = (*program, *chain[:end], *REDUCTIONS[unary][0])
            return {head + chain[: end + 1]: (tuple(step for step in steps if step != "no_op"), unary)}
        if UNARIES[unary].result != "element":
            break
    return {}


def _reduced(chain: tuple[str, ...]) -> tuple[str, ...]:
    """Return a chain with the mean at its end that a formula has, if it does not come to one number before."""
    return chain if _ends_in_number(chain) else (*chain, "mean")


def _joined(genotype: Genotype) -> tuple[str, ...]:
    """Return the key of what a branched formula's binary gives."""
    branches = zip(genotype.inputs, genotype.chains, strict=False)
    return (genotype.binary, *itertools.chain.from_iterable((name, *chain) for name, chain in branches))


@dataclass(frozen=True)
class Value:
    """Numbers of all layers, one after the other.

    Attributes:
        data: (R, elements), R = B rows, one per bit width, or one row.
        shapes: (C, K) of each layer; of pairs, a single (S B, S B).
        counts: elements of each layer, of which C K are seen.
        pairs: whether these are pairs of layers.
    """

    data: Tensor
    shapes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    pairs: bool = False

    def layers(self) -> list[Tensor]:
        """Return one (R, C, K) per layer."""
        parts = self.data.split([rows * columns for rows, columns in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @staticmethod
    def of(parts: Sequence[Tensor], counts: Sequence[int] | None = None) -> Value:
        """Return the value of one (R, C, K) per layer."""
        shapes = tuple((part.shape[1], part.shape[2]) for part in parts)
        seen = tuple(rows * columns for rows, columns in shapes)
        return Value(torch.cat([part.flatten(1) for part in parts], dim=1), shapes, tuple(counts or seen))


class Evaluator:
    """Computes the scores of genotypes on one study's statistics; a part that was seen before is remembered.

    Args:
        statistics: of L layers in S slots at B choices.
        mode: "corrected", or "released": primitives with the traps of the released code.
        device: where statistics with one number per weight are kept.
        batched: whether the element-wise formulas of a population run in one launch of a kernel; None: on a GPU.
    """

    def __init__(
        self, statistics: LayerStatistics, *, mode: str = "corrected", device: str = "cpu", batched: bool | None = None
    ) -> None:
        if mode not in ("corrected", "released"):
            raise GenotypeSyntaxError(f"unknown mode {mode!r}; there are corrected and released.")
        self.choices, self.slots = statistics.choices, statistics.slot_count
        self._statistics, self._mode, self._device = statistics, mode, device
        self._batched = device != "cpu" if batched is None else batched
        self._slot_of = torch.tensor(statistics.slots, device=device)
        self._known: dict[tuple, Value] = {}
        self._inputs: dict[str, Value] = {}
        self._prepared: dict[tuple, Value] = {}

    def prepare(self, genotypes: Sequence[Genotype]) -> None:
        """Compute the element-wise parts of a population's formulas in one launch for each geometry, if batched."""
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
                self._prepared[key] = Value(numbers, ((1, 1),) * len(shapes), (1,) * len(shapes))

    def scores(self, genotype: Genotype) -> np.ndarray:
        """Return the score table (S, B), or the matrix of pairs (S B, S B) of a formula that ends in one, float64.

        It may hold NaN or infinity, which screening rejects.
        """
        with torch.inference_mode():
            value = self._value(canonical(genotype))
            if value.pairs:
                return value.data.view(value.shapes[0]).double().cpu().numpy()
            rows = self._means(value).data.double().cpu().numpy()
        table = np.broadcast_to(rows, (len(self.choices), rows.shape[1])).T
        return self._statistics.per_slot(table)

    def score(self, genotype: Genotype, configs: np.ndarray) -> np.ndarray:
        """Return the score of each configuration (N, S), shape (N,)."""
        return score(self.scores(genotype), configs, self.choices, aggregation=genotype.aggregation)

    def _value(self, genotype: Genotype) -> Value:
        if genotype.structure == "sequential":
            (name,), (chain,) = genotype.inputs, genotype.chains
            return self._batched_chain((name,), _reduced(chain)) or self._chain(name, chain)
        if genotype.structure == "branched":
            *branches, last = genotype.chains
            value = self._batched_chain(_joined(genotype), _reduced(last))
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
        if not value.pairs:
            parts = [function(layer, count) for layer, count in zip(value.layers(), value.counts, strict=True)]
            return Value.of(parts, value.counts if unary.result == "layer" else None)
        if unary.result == "number":
            return self._over_others(value, function)
        (matrix,) = value.layers()
        return replace(value, data=function(matrix, value.counts[0]).flatten(1))

    def _over_others(self, value: Value, function: Callable[[Tensor, int], Tensor]) -> Value:
        """Reduce pairs to a number per layer and width: average over the other layer's widths, then reduce.

        A pair stands twice in the matrix, so its entries count twice; on the diagonal stands a layer alone. The sum is
        then the expected score of a layer at a width, whatever the others do.
        """
        choices = len(self.choices)
        matrix = value.data.view(self.slots * choices, self.slots, choices)
        others = 2 * matrix.mean(dim=2)
        own = torch.arange(self.slots, device=matrix.device).repeat_interleave(choices)
        options = torch.arange(len(own), device=matrix.device)
        others[options, own] = value.data.view(value.shapes[0]).diagonal()
        numbers = function(others[:, None, :], self.slots).reshape(self.slots, choices)
        return self._of_slots(numbers)

    def _binary(self, name: str, one: Value, two: Value) -> Value:
        binary = BINARIES[name]
        if one.shapes != two.shapes or one.pairs != two.pairs:
            one, two = self._means(one), self._means(two)
        if binary.result == "element":
            return replace(one, data=binary.function(one.data, two.data))
        parts = [binary.function(x, y) for x, y in zip(one.layers(), two.layers(), strict=True)]
        if one.pairs:
            return replace(one, data=parts[0].flatten(1).expand(1, one.data.shape[1]))
        return Value.of(parts)

    def _means(self, value: Value) -> Value:
        """Return one number per layer."""
        return self._unary("mean", value) if value.pairs or set(value.shapes) != {(1, 1)} else value

    def input(self, name: str) -> Value:
        """Return an input's value."""
        if name not in self._inputs:
            self._inputs[name] = self._load(name)
        return self._inputs[name]

    def _load(self, name: str) -> Value:
        statistics = self._statistics
        if len(name) == 2:
            plain = self.input(name[1])
            bits = torch.tensor(self.choices, dtype=torch.float32, device=self._device)[:, None]
            return replace(plain, data=bits * plain.data)
        if name in PAIRS:
            matrix = -clado(statistics) if name == "P" else -added_logit_changes(statistics)
            data = torch.from_numpy(matrix).float().to(self._device).reshape(1, -1)
            return Value(data, (matrix.shape,), (matrix.size,), pairs=True)
        per_layer = {
            "b": lambda: np.repeat(np.array(self.choices)[:, None], len(statistics.names), axis=1),
            "n": lambda: statistics.parameters[None],
            "T": lambda: (statistics.trace / statistics.parameters)[None],
            "O": lambda: statistics.output_error.T,
        }
        if name in per_layer:
            return self._of_layers(per_layer[name]())
        if name in ("K", "L"):
            return self._of_slots(torch.tensor(statistics.kl if name == "K" else statistics.loss))
        tensors: Sequence[Tensor] = {
            "W": lambda: [sampled(w)[None] for w in statistics.weights],
            "E": lambda: [sampled(e) for e in statistics.errors],
            "A": lambda: [a[None] for a in statistics.activations],
            "G": lambda: [g[None] for g in statistics.gradients],
            "V": lambda: [v[None] for v in statistics.virtual_gradients],
            "R": lambda: [r[None] for r in statistics.positive_gradients],
            "H": lambda: [h[None] for h in statistics.curvature],
            "C": lambda: [c[None] / (2 * c.shape[1]) ** 0.5 for c in statistics.channel_products],
        }[name]()
        counts = None if name in ("A", "C") else statistics.parameters.tolist()
        return Value.of([tensor.float().to(self._device) for tensor in tensors], counts)

    def _of_layers(self, rows: np.ndarray) -> Value:
        data = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(self._device)
        return Value(data, ((1, 1),) * data.shape[1], (1,) * data.shape[1])

    def _of_slots(self, table: Tensor) -> Value:
        """Share what is known of a slot (S, B) equally among its layers."""
        rows = table.to(self._device).T[:, self._slot_of] / self._slot_of.bincount()[self._slot_of]
        return Value(rows.float(), ((1, 1),) * rows.shape[1], (1,) * rows.shape[1])
