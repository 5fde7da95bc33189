"""The element-wise parts of formulas as programs of the kernel, so that a population runs in one launch.

Explained in chapter 03.
"""

from __future__ import annotations

import itertools

from emq_lib.evolution.genotypes import Genotype, canonical, ends_in_number
from emq_lib.evolution.primitives import BINARIES, GEOMETRY, REDUCTIONS, UNARIES


def element_programs(genotype: Genotype) -> dict[tuple[str, ...], tuple[tuple[str, ...], str]]:
    """Return the parts of a formula that are element-wise up to a reduction, as programs of the kernel.

    A part is the beginning of a chain on an input, or of what follows the binary of two element-wise branches on inputs
    of like geometry. A DAG has none.

    Returns:
        key of the part -> the program in postfix order, and the reduction that its mean stands for, of
        :data:`REDUCTIONS`.

    >>> from emq_lib.evolution.genotypes import parse
    >>> element_programs(parse("branched(product; bW: no_op; G: no_op; abs, sum)"))
    {('product', 'G', 'no_op', 'bW', 'no_op', 'abs', 'sum'): (('G', 'W', 'times b', 'product', 'abs'), 'sum')}
    """
    short = canonical(genotype)
    if short.structure == "dag":
        return {}
    geometries = [GEOMETRY.get(name[-1], "weights") for name in short.inputs]
    branched, parts, branches = short.structure == "branched", {}, []
    for name, chain, geometry in zip(short.inputs, short.chains, geometries, strict=False):
        program = (name,) if len(name) == 1 else (name[1], "times b")
        branches.append((*program, *chain))
        if geometry not in ("number", "pairs"):
            parts |= _part((name,), program, chain if branched else reduced(chain))
    alike = branched and geometries[0] == geometries[1] and geometries[0] not in ("number", "pairs")
    functions = [UNARIES[unary] for chain in short.chains[:-1] for unary in chain]
    if alike and all(one.result == "element" for one in (*functions, BINARIES[short.binary])):
        parts |= _part(joined(short), (*branches[0], *branches[1], short.binary), reduced(short.chains[-1]))
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


def reduced(chain: tuple[str, ...]) -> tuple[str, ...]:
    """Return a chain with the mean at its end that a formula has, if it does not come to one number before."""
    return chain if ends_in_number(chain) else (*chain, "mean")


def joined(genotype: Genotype) -> tuple[str, ...]:
    """Return the key of what a branched formula's binary gives."""
    branches = zip(genotype.inputs, genotype.chains, strict=False)
    return (genotype.binary, *itertools.chain.from_iterable((name, *chain) for name, chain in branches))
