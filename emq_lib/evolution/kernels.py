"""The Triton kernel behind evolved formulas: many element-wise programs over the numbers of all layers in one launch.

Imported only where formulas are evaluated in batches, on a GPU. Without one it is run by Triton's interpreter, slowly,
which is how it is tested there. Explained in chapter 03.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when its own functions are decorated, on import
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from emq_lib.core.errors import InvalidParameterError  # noqa: E402

TIMES_BITS = "times b"  # the one function that asks for the bit width of its row
UNARY = ("abs", "pow2", "cube", "negate", "sign", "relu", "leaky_relu", "sqrt", "rsqrt", "cbrt", "invert", "log")
UNARY += ("abslog", "log1p", "exp", "sigmoid", "tanh", "softplus", "mish", "swish", TIMES_BITS)
BINARY = ("sum", "difference", "product", "ratio", "average", "maximum", "minimum", "less", "greater", "equal")
BINARY += ("hamming",)
DEPTH = 3  # values that wait on the stack at most
BLOCK = 1_024
Tensor = torch.Tensor
_FIRST_BINARY, _FIRST_INPUT = tl.constexpr(len(UNARY)), tl.constexpr(len(UNARY) + len(BINARY))
_EPSILON = tl.constexpr(1e-9)


def postfix_means(
    programs: Sequence[Sequence[str]], inputs: Mapping[str, Tensor], lengths: Sequence[int], choices: Sequence[int]
) -> Tensor:
    """Run element-wise programs over the numbers of all layers, and average inside each layer.

    A program is in postfix order: an input pushes its number, a unary function replaces the last number, a binary one
    the last two: ``("E", "pow2", "H", "product")``.

    Args:
        programs: P of them; names of inputs, of :data:`UNARY` and of :data:`BINARY`.
        inputs: float32, shape (R, E) or (1, E) where bits do not matter; R bit widths, the E numbers of all layers.
        lengths: how many of the E numbers each layer has, L in all.
        choices: the R bit widths.

    Returns:
        shape (P, R, L), float32.

    Raises:
        InvalidParameterError: a name that is not known, or a program that does not leave exactly one number.
    """
    names = list(inputs)
    rows = torch.cat(list(inputs.values()))
    firsts, steps, first = [], [], 0
    for data in inputs.values():
        firsts.append(first)
        steps.append(int(len(data) > 1))
        first += len(data)
    longest = max(map(len, programs))
    codes = [_encode(program, names) for program in programs]
    padded = torch.tensor([code + [-1] * (longest - len(code)) for code in codes], dtype=torch.int32)
    counts = torch.tensor([len(code) for code in codes], dtype=torch.int32)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    small = (padded, counts, torch.tensor(firsts), torch.tensor(steps), starts, torch.tensor(choices).float())
    found = rows.new_empty(len(programs), len(choices), len(lengths))
    _postfix_means[(len(programs), len(choices) * len(lengths))](
        rows, *(part.to(rows.device) for part in small), found, longest, rows.shape[1], len(lengths), BLOCK
    )
    return found


def postfix_means_reference(
    programs: Sequence[Sequence[str]],
    inputs: Mapping[str, Tensor],
    lengths: Sequence[int],
    functions: Mapping[str, Callable[..., Tensor]],
) -> Tensor:
    """Return what :func:`postfix_means` does, by plain PyTorch, with these functions."""
    found = []
    for program in programs:
        stack: list[Tensor] = []
        for name in program:
            if name in inputs:
                stack.append(inputs[name])
            else:
                taken = [stack.pop() for _ in range(1 if name in UNARY else 2)]
                stack.append(functions[name](*reversed(taken)))
        (value,) = stack
        found.append(torch.stack([part.mean(dim=1) for part in value.split(list(lengths), dim=1)], dim=1))
    rows = max(map(len, inputs.values()))
    return torch.stack([means.expand(rows, -1) for means in found])


def _encode(program: Sequence[str], inputs: Sequence[str]) -> list[int]:
    """Return the codes of a program: unary functions, binary ones, inputs."""
    known = [*UNARY, *BINARY, *inputs]
    depth, deepest = 0, 0
    for name in program:
        if name not in known:
            raise InvalidParameterError(f"unknown name {name!r} in a program; there are {', '.join(known)}.")
        depth += 1 if name in inputs else 0 if name in UNARY else -1
        if depth < 1:
            raise InvalidParameterError(f"{name!r} in {' '.join(program)} finds too few numbers before it.")
        deepest = max(deepest, depth)
    if depth != 1 or deepest > DEPTH:
        raise InvalidParameterError(
            f"{' '.join(program)} leaves {depth} numbers, {deepest} at once; one must be left, at most {DEPTH} at once."
        )
    return [known.index(name) for name in program]


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x >= 0, exact for small x."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _tanh(x):
    shrunk = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    near = tl.abs(x) * (1.0 - x * x * (1.0 / 3.0 - x * x * (2.0 / 15.0)))
    size = tl.where(tl.abs(x) < 0.05, near, far)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _invert(x):
    return tl.where(x < 0.0, -1.0, 1.0) / (tl.abs(x) + _EPSILON)


@triton.jit
def _unary(code, x, bits):
    """Return a unary function of a tile, by its place in UNARY."""
    if code == 0:
        y = tl.abs(x)
    elif code == 1:
        y = x * x
    elif code == 2:
        y = x * x * x
    elif code == 3:
        y = -x
    elif code == 4:
        y = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    elif code == 5:
        y = tl.maximum(x, 0.0)
    elif code == 6:
        y = tl.where(x > 0.0, x, 0.1 * x)
    elif code == 7:
        y = tl.sqrt(tl.maximum(x, 0.0))
    elif code == 8:
        y = 1.0 / tl.sqrt(tl.abs(x) + _EPSILON)
    elif code == 9:
        size = tl.exp(tl.log(tl.where(x == 0.0, 1.0, tl.abs(x))) / 3.0)
        y = tl.where(x == 0.0, 0.0, tl.where(x < 0.0, -size, size))
    elif code == 10:
        y = _invert(x)
    elif code == 11:
        y = tl.log(tl.maximum(x, 0.0) + _EPSILON)
    elif code == 12:
        y = tl.log(tl.abs(x) + _EPSILON)
    elif code == 13:
        y = _log1p(tl.abs(x))
    elif code == 14:
        y = tl.exp(tl.minimum(x, 30.0))
    elif code == 15:
        y = tl.sigmoid(x)
    elif code == 16:
        y = _tanh(x)
    elif code == 17:
        y = _softplus(x)
    elif code == 18:
        y = x * _tanh(_softplus(x))
    elif code == 19:
        y = x * tl.sigmoid(x)
    else:
        y = x * bits
    return y


@triton.jit
def _binary(code, x, y):
    """Return a binary function of two tiles, by its place in BINARY."""
    if code == 0:
        z = x + y
    elif code == 1:
        z = x - y
    elif code == 2:
        z = x * y
    elif code == 3:
        z = x * _invert(y)
    elif code == 4:
        z = (x + y) / 2.0
    elif code == 5:
        z = tl.maximum(x, y)
    elif code == 6:
        z = tl.minimum(x, y)
    elif code == 7:
        z = tl.where(x < y, 1.0, 0.0)
    elif code == 8:
        z = tl.where(x > y, 1.0, 0.0)
    elif code == 9:
        z = tl.where(x == y, 1.0, 0.0)
    else:
        z = tl.where((x > 0.0) != (y > 0.0), 1.0, 0.0)
    return z


@triton.jit
def _postfix_means(
    rows, codes, counts, firsts, steps, starts, choices, found, longest, elements, layers, BLOCK: tl.constexpr
):
    """Mean of one program over one layer at one bit width; the stack's top three are kept in registers."""
    program, place = tl.program_id(0), tl.program_id(1)
    row, layer = place // layers, place % layers
    start, end = tl.load(starts + layer), tl.load(starts + layer + 1)
    bits, count = tl.load(choices + row), tl.load(counts + program)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(start, end, BLOCK):
        offsets = tile + tl.arange(0, BLOCK)
        inside = offsets < end
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        second, third = top, top
        for step in range(count):
            code = tl.load(codes + program * longest + step)
            if code < _FIRST_BINARY:
                top = _unary(code, top, bits)
            elif code < _FIRST_INPUT:
                top = _binary(code - _FIRST_BINARY, second, top)
                second = third
            else:
                source = code - _FIRST_INPUT
                line = tl.load(firsts + source) + row * tl.load(steps + source)
                third = second
                second = top
                top = tl.load(rows + line * elements + offsets, mask=inside, other=0.0)
        total += tl.where(inside, top, 0.0)
    tl.store(found + (program * tl.num_programs(1) + place), tl.sum(total) / (end - start))
