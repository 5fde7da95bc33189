"""The search space: text forms, canonical forms, known proxies as its points, the collapse of a released formula."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emq_lib import search_space as space
from emq_lib.errors import GenotypeSyntaxError
from emq_lib.layer_statistics import LayerStatistics
from emq_lib.released import ReleasedStatistics

CHOICES = (2, 3, 4)


def make_statistics(seed=0, shapes=((4, 9), (6, 18), (5, 12))):
    """Small statistics whose errors shrink with bits, so that formulas have something to find."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tuple(torch.randn(shape, generator=generator) for shape in shapes) for name in "WAGV"}
    curvature = tuple(torch.rand(shape, generator=generator) + 0.1 for shape in shapes)
    errors = tuple(
        torch.stack([torch.randn(shape, generator=generator) * (layer + 1) / 2**bits for bits in CHOICES])
        for layer, shape in enumerate(shapes)
    )
    unused = np.zeros(len(shapes))
    nothing = ReleasedStatistics(**dict.fromkeys([entry.name for entry in fields(ReleasedStatistics)], unused))
    return LayerStatistics(
        choices=CHOICES,
        names=tuple(f"layer{index}" for index in range(len(shapes))),
        slots=np.arange(len(shapes)),
        parameters=np.array([rows * columns for rows, columns in shapes]),
        macs=unused,
        weights=tensors["W"],
        activations=tensors["A"],
        gradients=tensors["G"],
        virtual_gradients=tensors["V"],
        curvature=curvature,
        errors=errors,
        trace=unused,
        trace_error=unused,
        eigenvalue=unused,
        similarity=unused,
        saliencies={},
        output_error=unused,
        kl=unused,
        loss=unused,
        logit_products=unused,
        pair_losses=unused,
        released=nothing,
        seconds={},
    )


@pytest.fixture(scope="module")
def statistics():
    return make_statistics()


@pytest.fixture(scope="module")
def evaluator(statistics):
    return space.Evaluator(statistics)


genotypes = st.builds(
    lambda structure, seed: space.random_genotype(structure, rng=np.random.default_rng(seed), prioritized=False),
    st.sampled_from(space.STRUCTURES),
    st.integers(0, 100_000),
)


@settings(max_examples=200, deadline=None)
@given(genotypes)
def test_text_parses_back_to_the_same_genotype(genotype):
    assert space.parse(str(genotype)) == genotype
    assert space.to_latex(genotype).startswith(r"S = \sum_l ")


@settings(max_examples=100, deadline=None)
@given(genotypes)
def test_canonical_form_keeps_the_scores_and_is_its_own(genotype):
    evaluator = space.Evaluator(make_statistics())
    short = space.canonical(genotype)
    found, expected = evaluator.table(short), evaluator.table(genotype)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)  # means may cancel to zero
    assert space.canonical(short) == short


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("cubic(W: abs)", 0, "linear or branched"),
        ("linear(X: abs)", 7, "W or A"),
        ("linear(W: cube)", 10, "no_op or log"),
        ("linear(W: abs", 13, "the end"),
        ("branched(sum; W: abs)", 20, "expected ;"),
        ("linear(W: abs) + 1", 15, r"found '\+'"),
    ],
)
def test_syntax_errors_say_where_and_what(text, position, expected):
    with pytest.raises(GenotypeSyntaxError, match=rf"position {position}: .*{expected}"):
        space.parse(text)


def test_there_are_as_many_primitives_as_promised():
    assert len(space.UNARIES) >= 20
    assert len(space.BINARIES) >= 4
    assert set(space.UNARY_WEIGHTS) == set(space.UNARIES)
    assert set(space.BINARY_WEIGHTS) == set(space.BINARIES)


def test_every_unary_is_finite_on_mixed_signs(statistics):
    x = statistics.errors[1]
    for name, unary in space.UNARIES.items():
        y = unary(x)
        assert torch.isfinite(y).all(), name
        assert y.shape in (x.shape, (3, 1, 1)), name
        assert (y.shape == (3, 1, 1)) == (name in space.SCALAR), name


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("normalize", lambda x: (x - x.mean()) / x.std()),
        ("min_max", lambda x: (x - x.min()) / (x.max() - x.min())),
        ("softmax", lambda x: np.exp(x) / np.exp(x).sum(axis=0)),
        ("logsoftmax", lambda x: x - np.log(np.exp(x).sum(axis=0))),
        ("sqrt", lambda x: np.sqrt(np.maximum(x, 0))),
        ("log", lambda x: np.log(np.maximum(x, 0) + 1e-9)),
        ("invert", lambda x: 1 / x),
        ("std", lambda x: x.std()),
        ("var", lambda x: x.var()),
        ("l1", lambda x: np.abs(x).mean()),
        ("frobenius", lambda x: np.linalg.norm(x)),
    ],
)
def test_unaries_against_numpy_one_width_at_a_time(name, truth, statistics):
    x = statistics.errors[2]
    found = space.UNARIES[name](x).numpy()
    for choice in range(3):
        np.testing.assert_allclose(found[choice].squeeze(), truth(x[choice].double().numpy()), rtol=2e-4, atol=1e-5)


def test_known_proxies_are_points_of_the_space(statistics, evaluator):
    def rows(function):
        return [[function(layer, choice) for choice in range(3)] for layer in range(3)]

    def error(layer, choice):
        return (statistics.errors[layer][choice].double() ** 2).mean().item()

    def curvature(layer):
        return statistics.curvature[layer].double().mean().item()

    known = {
        "linear(E: pow2, mean, negate)": rows(lambda layer, choice: -error(layer, choice)),
        "branched(product; H: negate, mean; E: pow2, mean)": rows(
            lambda layer, choice: -curvature(layer) * error(layer, choice)
        ),
        "branched(ratio; bW: l1, no_op; W: l1, no_op)": rows(lambda layer, choice: CHOICES[choice]),  # bit sum
    }
    for text, truth in known.items():
        np.testing.assert_allclose(evaluator.table(space.parse(text)), truth, rtol=1e-4)


def test_mean_of_a_softmax_over_channels_knows_nothing_but_their_number(statistics, evaluator):
    """The branch softmax(log|b G|) of the released formula is one over the channels, whatever the gradient."""
    table = evaluator.table(space.parse("linear(bG: abslog, softmax)"))
    np.testing.assert_allclose(table, [[1 / len(w)] * 3 for w in statistics.weights], rtol=1e-6)
    released = evaluator.table(space.parse("branched(product; bG: abslog, softmax; bW: relu, sqrt)"))
    by_hand = [[np.sqrt(b) * w.clamp(min=0).sqrt().mean().item() / len(w) for b in CHOICES] for w in statistics.weights]
    np.testing.assert_allclose(released, by_hand, rtol=1e-5)


def test_children_take_every_gene_from_a_parent():
    rng = np.random.default_rng(0)
    for structure in space.STRUCTURES:
        one, two = (space.random_genotype(structure, rng=rng) for _ in range(2))
        before = str(one), str(two)
        for _ in range(20):
            child = space.cross(one, two, rng=rng)
            assert child.binary in (one.binary, two.binary)
            for branch, first, second in zip(child.branches, one.branches, two.branches, strict=True):
                assert branch.source in (first.source, second.source)
                genes = zip(branch.unaries, first.unaries, second.unaries, strict=True)
                assert all(gene in parents for gene, *parents in genes)
        assert (str(one), str(two)) == before
        assert space.mutate(one, rng=rng, probability=0.0) == one


def test_prioritized_sampling_draws_no_op_twice_as_often():
    rng = np.random.default_rng(1)
    drawn = [u for _ in range(3_000) for u in space.random_genotype("linear", rng=rng).branches[0].unaries]
    share = drawn.count("no_op") / drawn.count("abs")
    assert 1.6 < share < 2.5
