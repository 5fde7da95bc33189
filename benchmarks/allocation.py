"""Exact allocation: `emq_lib.allocation.exact` against the same integer program in PuLP, solved by CBC.

Random problems of MobileNetV2's shape: 53 layers, 7 widths, budgets for size and BOPs. Both must reach the same score
within both budgets before a time counts; stating the program is part of it, as a user waits for that too. Then the
front of 50 budgets, and how the time grows with the number of layers.

    python benchmarks/allocation.py

writes ``benchmarks/allocation.json``.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time

import numpy as np
import pulp
from engine import hardware

from emq_lib.allocation.exact import Allocation, allocate, pareto_front
from emq_lib.core.costs import CostTable, gather

RESULTS = pathlib.Path(__file__).with_suffix(".json")
CHOICES = tuple(range(2, 9))
LAYERS, PROBLEMS, POINTS, GROWTH = 53, 20, 50, (25, 50, 100, 200, 400)


def random_problem(seed: int, layers: int) -> tuple[np.ndarray, dict[str, CostTable], dict[str, float]]:
    """Draw errors that shrink about fourfold per bit, sizes, BOPs, and budgets between uniform 3 and uniform 5 bits."""
    rng = np.random.default_rng(seed)
    bits = np.array(CHOICES, dtype=np.float64)
    parameters, macs = (10 ** rng.uniform(low, low + 3, (layers, 1)) for low in (2, 4.5))
    scores = -(10 ** rng.uniform(-1, 1, (layers, 1))) * 4.0**-bits * rng.uniform(0.7, 1.4, (layers, len(bits)))
    costs = {
        "size": CostTable("size", "bytes", 0.0, np.ceil(parameters.round() * bits / 8)),
        "BOPs": CostTable("BOPs", "bit operations", 0.0, macs.round() * bits * 8),
    }
    budgets = {name: float(np.interp(rng.uniform(3, 5), bits, cost.table.sum(axis=0))) for name, cost in costs.items()}
    return scores, costs, budgets


def with_pulp(scores: np.ndarray, costs: dict[str, CostTable], budgets: dict[str, float]) -> tuple[int, ...]:
    """State the program in PuLP and solve it to optimality by CBC on one thread."""
    program = pulp.LpProblem("bits", pulp.LpMaximize)
    layers, widths = scores.shape
    take = [[pulp.LpVariable(f"x_{slot}_{at}", cat="Binary") for at in range(widths)] for slot in range(layers)]
    places = [(slot, at) for slot in range(layers) for at in range(widths)]
    program += pulp.lpSum(scores[slot, at] * take[slot][at] for slot, at in places)
    for slot in range(layers):
        program += pulp.lpSum(take[slot]) == 1
    for name, budget in budgets.items():
        table = costs[name].table / budget  # CBC's tolerances are absolute too
        program += pulp.lpSum(table[slot, at] * take[slot][at] for slot, at in places) <= 1
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=0.0))
    return tuple(CHOICES[max(range(widths), key=lambda at: take[slot][at].value())] for slot in range(layers))


def _timed(function) -> tuple[float, object]:
    started = time.perf_counter()
    found = function()
    return time.perf_counter() - started, found


def against_pulp() -> dict:
    """Solve the same problems both ways, compare, and return the times."""
    ours, theirs, different = [], [], 0
    for seed in range(PROBLEMS):
        problem = random_problem(seed, LAYERS)
        seconds, mine = _timed(lambda problem=problem: allocate(*problem, CHOICES))
        ours.append(seconds)
        seconds, bits = _timed(lambda problem=problem: with_pulp(*problem))
        theirs.append(seconds)
        check(problem, mine, bits)
        different += mine.bits != bits
    return {
        "layers": LAYERS,
        "widths": len(CHOICES),
        "budgets": 2,
        "problems": PROBLEMS,
        "answers that differ at equal score": different,
        "seconds of PuLP with CBC": statistics.median(theirs),
        "seconds of allocate": statistics.median(ours),
        "seconds of allocate, slowest": max(ours),
        "ratio": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
    }


def check(problem: tuple, mine: Allocation, bits: tuple[int, ...]) -> None:
    """Stop unless ours is proven, within the budgets, and no worse than theirs."""
    scores, costs, budgets = problem
    within = all(costs[name].total([mine.bits], CHOICES)[0] <= budget for name, budget in budgets.items())
    other = gather(scores, [bits], CHOICES)[0]
    theirs = all(costs[name].total([bits], CHOICES)[0] <= budget * (1 + 1e-6) for name, budget in budgets.items())
    same = np.isclose(mine.score, other, rtol=1e-5) or mine.score > other
    if not (mine.optimal and within and theirs and same):
        raise SystemExit(f"the two do not agree ({mine.score} and {other}): the times would mean nothing.")


def main() -> None:
    """Run the benchmark."""
    scores, costs, _ = random_problem(0, LAYERS)
    seconds, front = _timed(lambda: pareto_front(scores, costs["size"], CHOICES, points=POINTS))
    growth = {}
    for layers in GROWTH:
        times = [
            _timed(lambda seed=seed, n=layers: allocate(*random_problem(seed, n), CHOICES))[0] for seed in range(5)
        ]
        growth[str(layers)] = statistics.median(times)
    results = {
        "against PuLP": against_pulp(),
        "front": {"points": POINTS, "distinct": len(front), "seconds": seconds},
        "seconds by layers": growth,
        "hardware": hardware(),
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
