"""Allocation for scores with pairs, with a proof: an integer quadratic program, made linear.

The score of a configuration is the sum of a matrix's entries over all pairs of its options, an option being a slot at a
width. Every product of two options becomes a variable of its own, tied to both by the first level of the
reformulation-linearization technique (Sherali and Adams 1986): the options of a slot share a product out among them,
and so does every budget. HiGHS proves the answer, or says how far from one it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emq_lib.allocation.exact import Allocation, allocate, described
from emq_lib.allocation.knapsack import Knapsack, Problem, allowed_widths
from emq_lib.allocation.solver import MAGNITUDE, milp
from emq_lib.core.checks import real_number, real_numbers
from emq_lib.core.costs import CostTable
from emq_lib.core.errors import InvalidScoreError

PATIENCE = 60.0  # seconds


def allocate_pairs(
    scores: np.ndarray,
    costs: Mapping[str, CostTable],
    budgets: Mapping[str, float],
    choices: Sequence[int],
    *,
    layers: Sequence[str] | None = None,
    time_limit: float | None = PATIENCE,
) -> Allocation:
    """Allocate bits by a matrix of pairs: maximise sum_ij M[i, j] over the chosen options within budgets.

    A local search over one and two slots at a time, from the exact answers to the matrix's diagonal and to the means of
    its rows, finds what is then proven, or improved.

    Args:
        scores: matrix M, shape (S B, S B); higher is better. M[i, j] + M[j, i] is what two options are worth together.
        costs: name -> cost table of shape (S, B); those without a budget are reported only.
        budgets: name -> upper bound, in the unit of the cost of that name.
        choices: the B allowed widths, increasing.
        layers: names of the S searchable layers, for messages.
        time_limit: seconds, above 0, after which the best configuration so far is returned with its gap; twice that
            where the gap takes a program of its own. None waits for the proof: 18 slots with 3 widths took up to 6
            seconds, 51 were not proven in 150.

    Returns:
        The best allocation; `gap` is infinite if the time was too short for any bound.

    Raises:
        InvalidScoreError: the scores are no finite numbers, or no matrix of pairs.
        InvalidBitsError, InvalidParameterError, InfeasibleBudgetError: see
            :func:`emq_lib.allocation.exact.allocate`.

    >>> together = np.array([[-9.0, -3.0, 0, 0], [-3.0, -1.0, 0, -8.0], [0, 0, -9.0, -3.0], [0, -8.0, -3.0, -1.0]])
    >>> bits = CostTable("bits", "bits", fixed=0.0, table=np.array([[2.0, 3.0], [2.0, 3.0]]))
    >>> allocate_pairs(together, {"bits": bits}, {"bits": 6}, choices=(2, 3)).bits
    (2, 3)
    """
    choices = allowed_widths(choices)
    matrix = _checked_matrix(scores, len(choices))
    slots = len(matrix) // len(choices)
    if time_limit is not None:
        time_limit = real_number(time_limit, "time_limit", 0)
    alone, averaged = np.diag(matrix).reshape(slots, -1), matrix.mean(axis=1).reshape(slots, -1)
    starts = [allocate(each, costs, budgets, choices, layers=layers, tolerance=1e-4) for each in (alone, averaged)]
    problem = Knapsack.checked(alone, costs, budgets, choices, layers=layers).normal_form()
    program = _Program(-matrix, problem)
    found = min((program.climb(np.searchsorted(choices, start.bits)) for start in starts), key=program.regret)
    better, bound, proven = program.solve(program.regret(found), time_limit)
    if better is not None and program.regret(better) < program.regret(found):
        found = better
    regret = program.regret(found)
    gap = 0.0 if proven else max(0.0, regret - bound)
    return described([choices[index] for index in found], -regret, costs, choices, gap=gap, optimal=proven)


def _checked_matrix(scores: np.ndarray, columns: int) -> np.ndarray:
    """Return a matrix of pairs, made symmetric, without what two widths of one slot would be worth together."""
    found = real_numbers(scores, "scores", ndim=2)
    if not found.size or len(found) % columns or found.shape[1] != len(found):
        raise InvalidScoreError(f"{found.shape} is no matrix of pairs (S B, S B) for B = {columns} choices.")
    slot = np.repeat(np.arange(len(found) // columns), columns)
    apart = slot[:, None] != slot
    return np.where(apart, (found + found.T) / 2, 0.0) + np.diag(np.diag(found))


@dataclass(frozen=True)
class _Program:
    """A quadratic program over options: minimise the sum of a symmetric matrix over the chosen pairs within slacks.

    Attributes:
        matrix: shape (S B, S B), zero between two widths of one slot.
        problem: the knapsack, in normal form, whose excesses and slacks bound the choice.
    """

    matrix: np.ndarray
    problem: Problem

    @property
    def shape(self) -> tuple[int, int]:
        """S and B."""
        return self.problem.regrets.shape

    def regret(self, selected: np.ndarray) -> float:
        """Return what one choice index per slot costs."""
        chosen = np.arange(self.shape[0]) * self.shape[1] + selected
        return float(self.matrix[np.ix_(chosen, chosen)].sum())

    def climb(self, selected: np.ndarray) -> np.ndarray:
        """Change one slot or two, the best way each time, until nothing is won."""
        slots, columns = self.shape
        own = np.repeat(np.arange(slots), columns)
        slack = self.problem.slacks * (1 + 1e-12)
        excess = self.problem.excesses.reshape(len(slack), -1)
        while True:
            chosen = np.arange(slots) * columns + selected
            now = chosen[own]  # for every option the one that it would replace
            linear = 2 * self.matrix[:, chosen].sum(axis=1)
            linear = linear - 2 * self.matrix[np.arange(len(own)), now] + np.diag(self.matrix)  # of the option, alone
            single = linear - linear[now]
            change = self.matrix - self.matrix[now] - self.matrix[:, now] + self.matrix[np.ix_(now, now)]
            pairs = single[:, None] + single[None, :] + 2 * change
            pairs[own[:, None] == own] = np.inf
            np.fill_diagonal(pairs, single)
            more = excess - excess[:, now]
            left = slack - excess[:, chosen].sum(axis=1)
            added = more[:, :, None] + more[:, None, :]
            added[:, np.arange(len(own)), np.arange(len(own))] = more
            pairs[(added > left[:, None, None]).any(axis=0)] = np.inf
            one, two = np.unravel_index(pairs.argmin(), pairs.shape)
            if pairs[one, two] >= -1e-12 * np.abs(self.matrix).max():
                return selected
            after = selected.copy()
            after[own[[one, two]]] = np.array([one, two]) % columns
            if not self.problem.fits(after):
                return selected
            selected = after

    def solve(self, known: float, time_limit: float | None) -> tuple[np.ndarray | None, float, bool]:
        """Look for something better than what is known, by HiGHS.

        Returns:
            choice indices, None if there is none; a bound that nothing is below; and whether that is proven.
        """
        from scipy import optimize, sparse  # takes half a second, which who only reads or quantizes need not wait for

        slots, columns = self.shape
        options, own = np.flatnonzero(self.problem.allowed), np.repeat(np.arange(slots), columns)
        matrix, slot_of = self.matrix[np.ix_(options, options)], own[options]
        one, two = np.triu_indices(len(options), 1)
        apart = slot_of[one] != slot_of[two]
        one, two, n = one[apart], two[apart], len(options)
        product = n + np.arange(len(one))
        objective = np.concatenate([np.diag(matrix), 2 * matrix[one, two]])
        scale = (np.abs(objective).max() or 1.0) / MAGNITUDE

        def rows(height: int, *parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> sparse.csr_array:
            where = tuple(np.concatenate([part[axis] for part in parts]) for axis in (0, 1))
            values = np.concatenate([part[2] for part in parts])
            return sparse.coo_array((values, where), shape=(height, n + len(one))).tocsr()

        ones, every = np.ones(len(one)), np.arange(n)
        shared = rows(  # the products of an option with the options of another slot add up to the option
            slots * n,
            (slot_of[one] * n + two, product, ones),
            (slot_of[two] * n + one, product, ones),
            (np.repeat(np.arange(slots), n) * n + np.tile(every, slots), np.tile(every, slots), -np.ones(slots * n)),
        )[[row for row in range(slots * n) if row // n != slot_of[row % n]]]
        constraints = [
            optimize.LinearConstraint(rows(slots, (slot_of, every, np.ones(n))), 1, 1),
            optimize.LinearConstraint(shared, 0, 0),
            optimize.LinearConstraint(
                sparse.csr_array(objective[None] / scale), -np.inf, known / scale + 1e-6 * MAGNITUDE
            ),
        ]
        for excesses, slack in zip(self.problem.excesses, self.problem.slacks, strict=True):
            unit = slack if slack > 0 else 1.0
            excess, room = excesses.ravel()[options] / unit, slack / unit
            zeros = np.zeros(n, dtype=int)
            constraints.append(optimize.LinearConstraint(rows(1, (zeros, every, excess)), -np.inf, room))
            constraints.append(  # the same times every option
                optimize.LinearConstraint(
                    rows(n, (one, product, excess[two]), (two, product, excess[one]), (every, every, excess - room)),
                    -np.inf,
                    0,
                )
            )
        integral = np.arange(n + len(one)) < n
        result = milp(objective / scale, constraints, time_limit, integrality=integral, presolve=True)
        bound = result.mip_dual_bound
        if bound is None or np.isnan(bound):  # not even the program of mixtures was solved: that may go alone
            mixed = milp(objective / scale, constraints, time_limit, integrality=np.zeros(n + len(one)), presolve=True)
            bound = -np.inf if mixed.fun is None else mixed.fun
        bound *= scale
        if result.x is None:
            return None, bound, False
        selected = options[np.flatnonzero(result.x[:n] > 0.5)] % columns
        if len(selected) < slots or not self.problem.fits(selected):  # what only the solver's tolerance let pass
            return None, bound, False
        return selected, bound, result.status == 0
