"""The search space: text forms, canonical forms, primitives, hand-made proxies as its points, geometry of values."""

import dataclasses
import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emq_lib.core.errors import GenotypeSyntaxError
from emq_lib.evolution import primitives, spaces
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.genotypes import KNOWN, canonical, parse, to_latex, without_each_term
from emq_lib.evolution.programs import element_programs
from emq_lib.proxies import handmade
from emq_lib.proxies.layer_statistics import LayerStatistics
from emq_lib.proxies.released import ReleasedStatistics
from emq_lib.proxies.scores import AGGREGATIONS, score

CHOICES = (2, 3, 4)
SHAPES = ((4, 9), (6, 18), (5, 12))


def make_statistics(seed=0, shapes=SHAPES):
    """Small statistics whose errors shrink with bits, so that formulas have something to find."""
    rng = np.random.default_rng(seed)
    layers, options = len(shapes), len(shapes) * len(CHOICES)

    def normal(width=None):
        return tuple(torch.tensor(rng.normal(size=(rows, width or columns))).float() for rows, columns in shapes)

    weights, gradients, positive, products = normal(), normal(), normal(), normal(10)
    bits = np.array(CHOICES)
    errors = tuple(
        torch.tensor(rng.normal(size=(3, *shape)) * (layer + 1) / 2 ** bits[:, None, None]).float()
        for layer, shape in enumerate(shapes)
    )
    curvature = tuple(torch.tensor(rng.uniform(0.1, 1, shape)).float() for shape in shapes)
    falling = rng.uniform(0.5, 2, (layers, 1)) / 4.0**bits
    changes = rng.normal(size=(options, 40)) * np.sqrt(falling).reshape(-1, 1)
    pairs = 0.1 * changes @ changes.T / 40
    pairs[np.arange(options), np.arange(options)] = falling.ravel()
    numbers = {name: rng.uniform(0.1, 1, layers) for name in ("trace", "trace_error", "eigenvalue", "similarity")}
    saliencies = {
        "SNIP": np.array([(w * g).abs().sum() for w, g in zip(weights, gradients, strict=True)]),
        "plain": np.array([(w * g).sum() for w, g in zip(weights, gradients, strict=True)]),
        "Synflow": np.array([(w * r).abs().sum() for w, r in zip(weights, positive, strict=True)]),
        "Fisher": np.array([c.square().sum() / 20 for c in products]),
        "grad-norm": np.array([g.norm() for g in gradients]),
        "L2": np.array([w.norm() for w in weights]),
    }
    nothing = ReleasedStatistics(**dict.fromkeys([entry.name for entry in fields(ReleasedStatistics)], np.zeros(1)))
    return LayerStatistics(
        choices=CHOICES,
        names=tuple(f"layer{index}" for index in range(layers)),
        slots=np.arange(layers),
        parameters=np.array([rows * columns for rows, columns in shapes]),
        macs=np.arange(1, layers + 1),
        weights=weights,
        errors=errors,
        activations=normal(7),
        gradients=gradients,
        virtual_gradients=normal(),
        positive_gradients=positive,
        curvature=curvature,
        channel_products=products,
        saliencies=saliencies,
        fisher_error=np.array([(h * e.square()).sum(dim=(1, 2)) for h, e in zip(curvature, errors, strict=True)]),
        output_error=falling * rng.uniform(0.5, 2, falling.shape),
        kl=falling * rng.uniform(0.5, 2, falling.shape),
        loss=falling,
        logit_products=changes @ changes.T / 40,
        pair_losses=pairs,
        released=nothing,
        seconds={},
        **numbers,
    )


@pytest.fixture(scope="module")
def statistics():
    return make_statistics()


@pytest.fixture(scope="module")
def evaluator(statistics):
    return Evaluator(statistics)


genotypes = st.builds(
    lambda structure, aggregation, prioritized, seed: spaces.Space(
        structure, aggregations=(aggregation,), prioritized=prioritized
    ).random(np.random.default_rng(seed)),
    st.sampled_from(primitives.STRUCTURES),
    st.sampled_from(list(AGGREGATIONS)),
    st.booleans(),
    st.integers(0, 100_000),
)


@settings(max_examples=200, deadline=None)
@given(genotypes)
def test_text_parses_back_to_the_same_genotype(genotype):
    assert parse(str(genotype)) == genotype
    assert hash(parse(str(genotype))) == hash(genotype)
    assert to_latex(genotype).startswith("S = ")
    assert genotype.complexity >= len(set(genotype.inputs))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(genotypes)
def test_canonical_form_ranks_alike_and_is_its_own(genotype):
    """The evaluator reads canonical forms, so compare with every step of the longer form taken."""
    statistics, short = make_statistics(), canonical(genotype)
    assert canonical(short) == short
    plain = Evaluator(statistics)
    with torch.inference_mode():
        long, brief = plain._value(genotype), plain._value(short)
        if long.of != "pairs":
            long, brief = plain._means(long), plain._means(brief)
    torch.testing.assert_close(brief.data, long.data, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("cubic(W: abs)", 0, "weakest or survival or sequential or branched or dag"),
        ("sequential(X: abs)", 11, "b or n or W"),
        ("sequential(W: quartic)", 14, "no_op or log"),
        ("sequential(W: abs", 17, "the end"),
        ("branched(sum; W: abs; E: abs)", 28, "expected ;"),
        ("branched(power; W: abs; E: abs; abs)", 9, "sum or difference"),
        ("dag(W, E; abs)", 10, "expected 2 unaries, one for each input and earlier node, found 1"),
        ("sequential(W: abs) + 1", 19, r"expected the end, found '\+'"),
    ],
)
def test_syntax_errors_say_where_and_what(text, position, expected):
    with pytest.raises(GenotypeSyntaxError, match=rf"position {position}: .*{expected}"):
        parse(text)


def test_there_are_the_papers_number_of_primitives_and_its_names():
    assert len(primitives.UNARIES) + len(primitives.BINARIES) >= 56
    released = "log abslog abs pow2 exp normalize relu invert frobenius mean l1 softmax sigmoid logsoftmax sqrt negate"
    released += " min_max std no_op mish swish leaky_relu sign p_dist slogdet sum var min max gram"
    assert set(released.split()) <= set(primitives.UNARIES)
    released = "sum difference product matmul average less greater equal hamming distance divergence cosine mse"
    assert set(released.split()) | {"l1_distance"} <= set(primitives.BINARIES)


def test_sizes_of_the_papers_structures():
    """Linear 4 x 20^4, tree 4^2 x 20^4 x 4 and graph 4^2 x 20^9 follow from the same counting."""
    inputs, u, v = ("W", "A", "G", "V"), len(primitives.UNARIES), len(primitives.BINARIES)
    assert spaces.Space("sequential", inputs).size == 4 * u**4
    assert spaces.Space("branched", inputs, chains=(2, 2, 1)).size == 16 * u**4 * v * u
    assert spaces.Space("dag", inputs).size == 16 * u**9


LAYERWISE = {
    "normalize": lambda x: (x - x.mean()) / x.std(),
    "min_max": lambda x: (x - x.min()) / (x.max() - x.min()),
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=0),
    "logsoftmax": lambda x: x - np.log(np.exp(x).sum(axis=0)),
    "center": lambda x: x - x.mean(),
    "unit": lambda x: x / np.linalg.norm(x),
    "gram": lambda x: x @ x.T,
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "min": np.min,
    "std": np.std,
    "var": np.var,
    "l1": lambda x: np.abs(x).mean(),
    "linf": lambda x: np.abs(x).max(),
    "rms": lambda x: np.sqrt((x**2).mean()),
    "frobenius": np.linalg.norm,
    "median": lambda x: np.sort(x, axis=None)[(x.size - 1) // 2],
    "entropy": lambda x: -(np.abs(x) / np.abs(x).sum() * np.log(np.abs(x) / np.abs(x).sum())).sum(),
    "slogdet": lambda x: np.linalg.slogdet(x @ x.T / x.shape[1])[1],
    "p_dist": lambda x: np.mean([np.linalg.norm(one - two) for one, two in itertools.combinations(x, 2)]),
}
ELEMENTWISE = {
    "no_op": lambda x: x,
    "log": lambda x: math.log(max(x, 0) + 1e-9),
    "abslog": lambda x: math.log(abs(x) + 1e-9),
    "abs": abs,
    "pow2": lambda x: x**2,
    "exp": math.exp,
    "relu": lambda x: max(x, 0),
    "invert": lambda x: 1 / x,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "sqrt": lambda x: math.sqrt(max(x, 0)),
    "negate": lambda x: -x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "leaky_relu": lambda x: x if x > 0 else 0.1 * x,
    "sign": lambda x: math.copysign(1, x),
    "cube": lambda x: x**3,
    "cbrt": lambda x: math.copysign(abs(x) ** (1 / 3), x),
    "log1p": lambda x: math.log(1 + abs(x)),
    "tanh": math.tanh,
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "rsqrt": lambda x: abs(x) ** -0.5,
}


def test_every_unary_agrees_with_its_formula_one_layer_and_width_at_a_time(statistics, evaluator):
    assert set(LAYERWISE) | set(ELEMENTWISE) == set(primitives.UNARIES)
    with torch.inference_mode():
        error = evaluator.input("E")
        for name, unary in primitives.UNARIES.items():
            found = evaluator._unary(name, error).layers()
            for layer, width in itertools.product(range(3), range(3)):
                x = statistics.errors[layer][width].double().numpy()
                truth = LAYERWISE[name](x) if name in LAYERWISE else np.vectorize(ELEMENTWISE[name], otypes=[float])(x)
                value = found[layer][width].numpy()
                assert unary.result == ("number" if np.ndim(truth) == 0 else unary.result), name
                np.testing.assert_allclose(value.reshape(np.shape(truth)), truth, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_determinant_of_more_channels_than_weights_each_is_that_of_the_channels():
    layer = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    found = primitives.UNARIES["slogdet"].function(layer, 21).flatten().numpy()
    grams = np.einsum("rck,rdk->rcd", layer.double(), layer.double()) / 3
    np.testing.assert_allclose(found, np.linalg.slogdet(grams + 1e-9 * np.eye(7))[1], rtol=1e-6)


@pytest.mark.slow
def test_a_population_in_one_launch_scores_like_one_formula_at_a_time(statistics, evaluator):
    drawing = spaces.Space("branched", inputs=("W", "G", "E", "bW", "C", "bC"))
    rng = np.random.default_rng(0)
    tame = tuple(name for name in primitives.UNARIES if name not in ("invert", "rsqrt", "exp", "cube"))
    drawing = dataclasses.replace(
        drawing, unaries=tame, binaries=tuple(name for name in primitives.BINARIES if name != "ratio")
    )
    population = [KNOWN["bit-SNIP"], KNOWN["Fisher error"], *(drawing.random(rng) for _ in range(150))]
    together = Evaluator(statistics, batched=True)
    together.prepare(population)
    parts = {key for genotype in population for key in element_programs(genotype)}
    assert set(together._prepared) == parts
    assert len(parts) > 40
    assert {key[0] for key in parts} > {"W", "E", "C", "product"}
    for genotype in population:
        alone = evaluator.scores(genotype)
        scale = np.abs(alone[np.isfinite(alone)]).max(initial=1e-30)
        np.testing.assert_allclose(together.scores(genotype), alone, rtol=1e-3, atol=1e-5 * scale, err_msg=genotype)


def test_every_binary_agrees_with_its_formula(statistics, evaluator):
    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    truths = {
        "sum": lambda x, y: x + y,
        "difference": lambda x, y: x - y,
        "product": lambda x, y: x * y,
        "matmul": lambda x, y: x @ y.T,
        "average": lambda x, y: (x + y) / 2,
        "less": lambda x, y: (x < y).astype(float),
        "greater": lambda x, y: (x > y).astype(float),
        "equal": lambda x, y: (x == y).astype(float),
        "hamming": lambda x, y: ((x > 0) != (y > 0)).astype(float),
        "distance": lambda x, y: np.linalg.norm(x - y),
        "divergence": lambda x, y: (softmax(x) * np.log(softmax(x) / softmax(y))).sum(),
        "cosine": lambda x, y: (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y),
        "mse": lambda x, y: ((x - y) ** 2).mean(),
        "l1_distance": lambda x, y: np.abs(x - y).mean(),
        "ratio": lambda x, y: x / y,
        "maximum": np.maximum,
        "minimum": np.minimum,
    }
    assert set(truths) == set(primitives.BINARIES)
    with torch.inference_mode():
        weight, error = evaluator.input("W"), evaluator.input("E")
        for name, truth in truths.items():
            found = evaluator._binary(name, weight, error).layers()
            back = evaluator._binary(name, error, weight).layers()
            for layer, width in itertools.product(range(3), range(3)):
                x = statistics.weights[layer].double().numpy()
                y = statistics.errors[layer][width].double().numpy()
                expected = truth(x, y)
                value = found[layer][width].numpy().reshape(np.shape(expected))
                np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=name)
                if name in primitives.COMMUTATIVE:
                    torch.testing.assert_close(back[layer], found[layer])


@pytest.mark.parametrize("name", KNOWN)
def test_hand_made_proxies_are_points_of_the_space(name, statistics, evaluator):
    """The same numbers, but SQNR in decibels: 20 log10 there, natural logarithm here."""
    found, truth = evaluator.scores(KNOWN[name]), handmade.score_table(name, statistics)
    scale = 20 / math.log(10) if name == "SQNR" else 1.0
    np.testing.assert_allclose(found * scale, truth, rtol=1e-4, atol=1e-7)


def test_the_papers_proxies_are_points_of_the_space():
    named = {"bit-SNIP", "bit-Synflow", "bit-plain", "bit-Fisher", "HAWQ-V2", "relative weight error", "Fisher error"}
    assert named | {"bit sum", "parameter bits"} <= set(KNOWN)


def test_the_released_formula_knows_nothing_of_gradients(statistics):
    """Its softmax over channels has the mean one over their number, whatever the gradient."""
    other = dataclasses.replace(statistics, virtual_gradients=statistics.gradients)
    one, two = (Evaluator(s).scores(KNOWN["EMQ"]) for s in (statistics, other))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_released_primitives_have_their_traps(statistics):
    released = Evaluator(statistics, mode="released")
    log = parse("sequential(W: log)")
    assert np.isnan(released.scores(log)).all()
    assert np.isfinite(Evaluator(statistics).scores(log)).all()
    assert np.isinf(released.scores(parse("sequential(E: invert, exp)"))).any()


def test_unlike_geometries_meet_as_means_per_layer(statistics, evaluator):
    found = evaluator.scores(parse("branched(product; A: abs; E: pow2; no_op)"))
    truth = [
        [a.abs().mean() * e.square().mean() for e in errors]
        for a, errors in zip(statistics.activations, statistics.errors, strict=True)
    ]
    np.testing.assert_allclose(found, truth, rtol=1e-5)


def test_a_sum_over_pairs_is_the_expected_score_of_a_layer(statistics, evaluator):
    """Of all configurations that give a layer a width: their mean score, less what they have in common."""
    configs = np.array(list(itertools.product(CHOICES, repeat=3)))
    for name in ("CLADO", "added logit changes"):
        scores = score(handmade.score_table(name, statistics), configs, CHOICES)
        table = evaluator.scores(parse(f"sequential({'P' if name == 'CLADO' else 'D'}: sum, negate)"))
        for slot, choice in itertools.product(range(3), range(3)):
            chosen = configs[:, slot] == CHOICES[choice]
            reference = configs[:, slot] == CHOICES[2]
            gain = scores[chosen].mean() - scores[reference].mean()
            assert table[slot, choice] - table[slot, 2] == pytest.approx(gain, abs=1e-6)


def test_a_dag_adds_what_its_edges_bring(statistics, evaluator):
    found = evaluator.scores(parse("dag(E, H; pow2, abs; no_op, sqrt, negate)"))
    for layer in range(3):
        h = statistics.curvature[layer].double()
        for choice in range(3):
            e = statistics.errors[layer][choice].double()
            first = e**2 + h.abs()
            second = e + h.sqrt() - first
            truth = (first.mean() + second.mean()).item() / 2
            assert found[layer, choice] == pytest.approx(truth, rel=1e-4, abs=1e-6)


def test_layers_that_share_a_slot_are_added_up(statistics):
    tied = dataclasses.replace(statistics, slots=np.array([0, 1, 1]), kl=statistics.kl[:2], loss=statistics.loss[:2])
    error = parse("sequential(E: pow2, sum)")
    apart, together = (Evaluator(s).scores(error) for s in (statistics, tied))
    np.testing.assert_allclose(together, [apart[0], apart[1] + apart[2]])
    np.testing.assert_allclose(Evaluator(tied).scores(parse("sequential(K: no_op)")), tied.kl, rtol=1e-6)


def test_aggregations_by_hand(statistics, evaluator):
    config = np.array([[2, 4, 3]])
    table = evaluator.scores(KNOWN["one-layer KL"])
    parts = table[[0, 1, 2], [0, 2, 1]]
    scale = np.abs(table).mean()
    truth = {
        "sum": parts.sum(),
        "depth": parts[0] + 2 * parts[1] + 3 * parts[2],
        "weakest": parts.min(),
        "survival": sum(math.exp(parts[: end + 1].sum() / scale) for end in range(3)),
    }
    assert set(truth) == set(AGGREGATIONS)
    for name, expected in truth.items():
        genotype = parse(f"{'' if name == 'sum' else name + ' '}sequential(K: negate)")
        assert genotype.aggregation == name
        assert evaluator.score(genotype, config)[0] == pytest.approx(expected, rel=1e-6)


def test_children_take_every_gene_from_a_parent():
    rng = np.random.default_rng(0)
    for structure in primitives.STRUCTURES:
        whole = spaces.Space(structure, aggregations=tuple(AGGREGATIONS))
        one, two = whole.random(rng), whole.random(rng)
        before = str(one), str(two)
        for _ in range(20):
            child = spaces.cross(one, two, rng=rng)
            assert child.binary in (one.binary, two.binary)
            assert child.aggregation in (one.aggregation, two.aggregation)
            for gene, *parents in zip(child.inputs, one.inputs, two.inputs, strict=True):
                assert gene in parents
            for chain, first, second in zip(child.chains, one.chains, two.chains, strict=True):
                assert all(gene in parents for gene, *parents in zip(chain, first, second, strict=True))
        assert (str(one), str(two)) == before
        assert whole.mutate(one, rng=rng, probability=0.0) == one
        assert whole.mutate(one, rng=rng) != one


def test_prioritized_sampling_draws_by_weight():
    rng = np.random.default_rng(1)
    drawn = [u for _ in range(3_000) for u in spaces.Space("sequential").random(rng).chains[0]]
    assert 1.6 < drawn.count("no_op") / drawn.count("abs") < 2.5
    assert 0.3 < drawn.count("mish") / drawn.count("abs") < 0.7
    even = spaces.Space("sequential", prioritized=False)
    drawn = [u for _ in range(3_000) for u in even.random(rng).chains[0]]
    assert 0.7 < drawn.count("mish") / drawn.count("abs") < 1.4


def test_a_formula_without_each_of_its_terms():
    left = without_each_term(parse("branched(ratio; E: pow2, no_op; W: abs; negate)"))
    assert {what: str(genotype) for what, genotype in left.items()} == {
        "pow2 (1.1)": "branched(ratio; E: no_op, no_op; W: abs; negate)",
        "abs (2.1)": "branched(ratio; E: pow2, no_op; W: no_op; negate)",
        "negate (3.1)": "branched(ratio; E: pow2, no_op; W: abs; no_op)",
        "branch 1 on E": "sequential(W: abs, negate)",
        "branch 2 on W": "sequential(E: pow2, no_op, negate)",
    }


def test_a_space_can_be_walked_whole():
    small = {"unaries": ("abs", "no_op"), "binaries": ("sum", "ratio"), "chains": (1, 1, 1)}
    whole = spaces.Space("branched", ("K", "E"), **small)
    found = list(whole)
    assert len(found) == len(set(found)) == whole.size == 4 * 8 * 2
    even, rng = dataclasses.replace(whole, prioritized=False), np.random.default_rng(0)
    assert {even.random(rng) for _ in range(2_000)} == set(found)
    assert len(list(spaces.Space("dag", ("K",), unaries=("abs",)))) == 1


def test_known_proxies_fit_into_a_space_with_the_same_ranks(statistics, evaluator):
    configs = np.array(list(itertools.product(CHOICES, repeat=3)))
    branched = spaces.Space("branched")
    fitting = {name: branched.fit(genotype) for name, genotype in KNOWN.items()}
    assert fitting["EMQ"] is None  # its branches have three unaries
    for name in ("one-layer KL", "HAWQ-V2", "CLADO", "bit-SNIP"):
        filled = fitting[name]
        assert [len(chain) for chain in filled.chains] == [2, 2, 2]
        one, two = (evaluator.score(genotype, configs) for genotype in (KNOWN[name], filled))
        np.testing.assert_allclose(two, one * np.median(two / one), rtol=1e-5)
    assert spaces.Space("branched", ("W", "E")).fit(KNOWN["HAWQ-V2"]) is None
    assert spaces.Space("dag").fit(KNOWN["HAWQ-V2"]) is None
