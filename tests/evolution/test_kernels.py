"""The kernel of element-wise programs, run by Triton's interpreter, against plain PyTorch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from emq_lib.core.errors import InvalidParameterError
from emq_lib.evolution import kernels
from emq_lib.evolution.primitives import BINARIES, UNARIES

CHOICES, LENGTHS = (2, 3, 4), (5, 1_200, 64)  # one layer longer than a tile
FUNCTIONS = {name: entry.function for name, entry in (UNARIES | BINARIES).items()}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    fixed, by_bits = (torch.randn(rows, sum(LENGTHS), generator=generator) for rows in (1, 3))
    fixed[0, ::7] = 0.0
    by_bits[:, ::5] = fixed[:, ::5]  # so that some are equal
    return {"W": fixed, "E": by_bits}


def _agree(programs, inputs):
    functions = FUNCTIONS | {kernels.TIMES_BITS: lambda x: torch.tensor(CHOICES).float()[:, None] * x}
    found = kernels.postfix_means(programs, inputs, LENGTHS, CHOICES)
    truth = kernels.postfix_means_reference(programs, inputs, LENGTHS, functions)
    assert found.shape == (len(programs), len(CHOICES), len(LENGTHS))
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.slow
def test_every_function_agrees_with_the_primitive_of_its_name(inputs):
    _agree([("E", name) for name in kernels.UNARY], inputs)
    _agree([("W", name) for name in kernels.UNARY], inputs)
    _agree([("W", "E", name) for name in kernels.BINARY], inputs)


def test_every_element_wise_primitive_has_a_code():
    assert {name for name, entry in UNARIES.items() if entry.result == "element"} <= {"no_op", *kernels.UNARY}
    assert {name for name, entry in BINARIES.items() if entry.result == "element"} == set(kernels.BINARY)


@pytest.mark.slow
def test_random_programs_agree_whatever_else_runs_in_the_launch(inputs):
    rng = np.random.default_rng(0)
    tame = [name for name in kernels.UNARY if name not in ("invert", "rsqrt", "cube", "exp")]
    programs = []
    for _ in range(40):
        one, two, last = (tuple(rng.choice(tame, size=rng.integers(3))) for _ in range(3))
        names = rng.choice(list(inputs), size=2)
        programs.append((names[0], *one, names[1], *two, rng.choice(kernels.BINARY), *last))
    _agree([tuple(map(str, program)) for program in programs if "ratio" not in program], inputs)
    _agree([("W", "E", "W", "sum", "product")], inputs)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.049, 0.051, 1.0, 9.0, 80.0])
def test_small_and_large_arguments_keep_their_digits(size):
    inputs = {"x": torch.tensor([[size, -size]])}
    for name in ("tanh", "softplus", "log1p", "mish", "swish", "cbrt", "sigmoid"):
        found = kernels.postfix_means([("x", name)], inputs, (1, 1), (2,))[0, 0]
        truth = FUNCTIONS[name](inputs["x"].double())[0]
        torch.testing.assert_close(found.double(), truth, rtol=3e-6, atol=1e-30, msg=f"{name}({size})")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (("W", "median"), "unknown name 'median'"),
        (("W", "sum"), "too few numbers"),
        (("W", "E"), "leaves 2 numbers"),
        (("W",) * 4 + ("sum",) * 3, "4 at once"),
    ],
)
def test_programs_that_leave_no_single_number_are_refused(program, message, inputs):
    with pytest.raises(InvalidParameterError, match=message):
        kernels.postfix_means([program], inputs, LENGTHS, CHOICES)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emq_lib.evolution import kernels

kernel = kernels._postfix_means
kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("rows", "choices", "found"), "*fp32")
kinds |= dict.fromkeys(("codes", "counts", "starts"), "*i32") | dict.fromkeys(("firsts", "steps"), "*i64")
source = ASTSource(kernel, signature=kinds | {"BLOCK": "constexpr"}, constexprs={"BLOCK": kernels.BLOCK})
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@pytest.mark.slow
def test_it_compiles_for_a_gpu_where_there_is_none():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10_000


IMPORTS = """
import sys
from emq_lib.evolution import evaluator, fitness, genotypes, methods, primitives, programs, search, spaces
import book.studies.evolution
found = sorted({name.partition(".")[0] for name in sys.modules} & {"triton", "matplotlib", "sphinx", "IPython"})
assert not found, found
"""


@pytest.mark.slow
def test_nothing_imports_triton_before_it_is_needed():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
