"""What functions of the proxies cannot work on is refused by a named error, and left as it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emq_lib.core.datasets import Split
from emq_lib.core.errors import (
    ConfigLengthError,
    EMQError,
    InvalidBitsError,
    InvalidParameterError,
    InvalidScoreError,
    UnsupportedModelError,
)
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies import curvature, intervals, measuring, oracles, passes, ranking, saliency
from emq_lib.proxies.handmade import PROXIES, Proxy, score_table
from emq_lib.proxies.scores import score

NAMES = ["conv", "fc"]
SHAPE = (1, 4, 4)


class Small(nn.Module):
    """A convolution, a function and a classifier."""

    def __init__(self, function=F.relu, output=lambda y: y):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.function, self.output = function, output

    def forward(self, x):
        return self.output(self.fc(self.function(self.conv(x)).flatten(1)))


class Twice(Small):
    """Its classifier runs twice."""

    def forward(self, x):
        y = self.conv(x).flatten(1)
        return self.fc(y) + self.fc(F.relu(y))


class Around(Small):
    """Its classifier does not run."""

    def forward(self, x):
        return self.conv(x).flatten(1)


def _generator():
    return torch.Generator().manual_seed(0)


def _split(count=6):
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=_generator(), dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 3, mean=torch.tensor([0.5]), std=torch.tensor([0.3]))


def _labelled(label):
    split = _split()
    return Split(split.images, torch.full_like(split.labels, label), split.mean, split.std)


def _with(model, change):
    change(model)
    return model


STATISTICS = {
    "moments": lambda m, n, s: curvature.gradient_moments(m, n, s, batch_size=4),
    "traces": lambda m, n, s: curvature.hessian_traces(m, n, s, generator=_generator()),
    "probes": lambda m, n, s: curvature.hutchinson_traces(m, n, s, generator=_generator()),
    "eigenvalues": lambda m, n, s: curvature.top_eigenvalues(m, n, s),
    "virtual": lambda m, n, s: saliency.virtual_gradients(m, n, SHAPE),
    "positive": lambda m, n, s: saliency.positive_gradients(m, n, SHAPE),
    "Synflow": lambda m, n, s: saliency.synflow(m, n, SHAPE),
    "products": lambda m, n, s: saliency.channel_products(m, n, s),
    "Fisher": lambda m, n, s: saliency.channel_fisher(m, n, s),
    "GraSP": lambda m, n, s: saliency.grasp(m, n, s),
    "ZiCo": lambda m, n, s: saliency.zico(m, n, s, batch_size=3),
    "Zen": lambda m, n, s: saliency.zen(m, n, SHAPE, images=2, generator=_generator()),
    "NWOT": lambda m, n, s: saliency.nwot(m, n, s),
    "CKA": lambda m, n, s: saliency.linear_cka(m, n, s),
    "activations": lambda m, n, s: measuring.activation_samples(m, n, s),
}
READ_IMAGES = [name for name in STATISTICS if name not in ("virtual", "positive", "Synflow", "Zen")]
READ_LABELS = ("moments", "probes", "products", "Fisher", "GraSP", "ZiCo")
KEEP_OUTPUTS = ("moments", "traces", "eigenvalues", "products", "Fisher", "Zen", "NWOT", "CKA")


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_sound_network_is_measured(statistic):
    """What the cases below change is what is refused."""
    STATISTICS[statistic](fold_batchnorm(Small()), NAMES, _split())


def _refused(error, message, call, model, *rest):
    """Check that a call is refused by this error, and that the network and the images stay what they were."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = copy.deepcopy([part for part in rest if isinstance(part, Split | np.ndarray | list)])
    with pytest.raises(error, match=message):
        call(model, *rest)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) or value.isnan().any() for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for one, other in zip(kept, [part for part in rest if isinstance(part, Split | np.ndarray | list)], strict=True):
        assert torch.equal(one.images, other.images) if isinstance(one, Split) else one == other


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], InvalidParameterError, "need the names of layers"),
        (["conv", "conv"], InvalidParameterError, "each once"),
        (
            ["stem"],
            UnsupportedModelError,
            r"'stem' is no convolution or linear layer; the network has \['conv', 'fc'\]",
        ),
        ([""], UnsupportedModelError, "is no convolution"),
    ],
)
def test_names_that_are_no_layers(statistic, names, error, message):
    _refused(error, message, STATISTICS[statistic], fold_batchnorm(Small()), names, _split())


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.train(), "is in training mode: call eval"),
        (lambda m: m.double(), "weights of torch.float64: call float"),
        (lambda m: m.half(), "weights of torch.float16: call float"),
    ],
)
def test_networks_in_another_state(statistic, change, message):
    _refused(UnsupportedModelError, message, STATISTICS[statistic], _with(Small().eval(), change), NAMES, _split())


@pytest.mark.parametrize("statistic", READ_IMAGES)
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: (y, y), "must return logits .*, got tuple"),
        (lambda y: {"logits": y}, "got dict"),
        (lambda y: y[:, :1], r"got \(\d, 1\)"),
        (lambda y: y[:, 0], r"got \(\d,\)"),
        (lambda y: y[:, :, None, None], r"got \(\d, 3, 1, 1\)"),
        (lambda y: y.mean(dim=0, keepdim=True).expand(7, 3), r"got \(7, 3\)"),
    ],
)
def test_outputs_that_are_no_logits(statistic, output, message):
    model = Small(output=output).eval()
    _refused(UnsupportedModelError, message, STATISTICS[statistic], model, NAMES, _split())


@pytest.mark.parametrize("statistic", KEEP_OUTPUTS)
def test_layers_that_run_twice_or_never(statistic):
    call = STATISTICS[statistic]
    twice, around = (fold_batchnorm(kind()) for kind in (Twice, Around))
    _refused(UnsupportedModelError, "'fc' runs more than once", call, twice, NAMES, _split())
    around.fc = nn.Linear(8, 3)  # which tracing leaves out
    _refused(
        UnsupportedModelError,
        r"\['fc'\] did not run|does not depend on layer 'fc'",
        call,
        around.eval(),
        NAMES,
        _split(),
    )


@pytest.mark.parametrize("statistic", READ_LABELS)
@pytest.mark.parametrize("label", [3, 255])
def test_labels_that_are_no_classes(statistic, label):
    message = f"label {label} is none of the network's 3 classes"
    _refused(InvalidParameterError, message, STATISTICS[statistic], fold_batchnorm(Small()), NAMES, _labelled(label))


@pytest.mark.parametrize("statistic", READ_IMAGES)
def test_no_images(statistic):
    _refused(
        InvalidParameterError, "number of images", STATISTICS[statistic], fold_batchnorm(Small()), NAMES, _split(0)
    )


@pytest.mark.parametrize("size", [0, -1, 2.5, None, "8", True])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, n, s, size: curvature.gradient_moments(m, n, s, batch_size=size),
        lambda m, n, s, size: curvature.hessian_traces(m, n, s, generator=_generator(), batch_size=size),
        lambda m, n, s, size: curvature.hutchinson_traces(m, n, s, generator=_generator(), batch_size=size),
        lambda m, n, s, size: curvature.hutchinson_traces(m, n, s, generator=_generator(), probes=size),
        lambda m, n, s, size: curvature.top_eigenvalues(m, n, s, batch_size=size),
        lambda m, n, s, size: saliency.zico(m, n, s, batch_size=size),
        lambda m, n, s, size: saliency.virtual_gradients(m, n, SHAPE, images=size),
        lambda m, n, s, size: saliency.zen(m, n, SHAPE, images=size, generator=_generator()),
        lambda m, n, s, size: measuring.output_errors(m, {"fc": [m.fc.weight]}, s, batch_size=size),
        lambda m, n, s, size: passes.one_slot_logits(m, [["fc"]], {"fc": [m.fc.weight]}, s, batch_size=size),
    ],
)
def test_counts_that_are_none(call, size):
    model = fold_batchnorm(Small())
    with pytest.raises(InvalidParameterError, match="whole number"):
        call(model, NAMES, _split(), size)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: curvature.hessian_traces(m, NAMES, _split()),
        lambda m: curvature.hutchinson_traces(m, NAMES, _split()),
        lambda m: saliency.zen(m, NAMES, SHAPE, images=2),
        lambda m: curvature._drawn_seeds(torch.ones(2, 3), combinations=2),
    ],
)
def test_what_draws_needs_a_generator(call):
    with pytest.raises(TypeError, match="generator"):
        call(fold_batchnorm(Small()))


@pytest.mark.parametrize("combinations", [0, -2, 1.5, "2"])
def test_combinations_that_are_none(combinations):
    with pytest.raises(InvalidParameterError, match="combinations must be"):
        curvature.hessian_traces(
            fold_batchnorm(Small()), NAMES, _split(), combinations=combinations, generator=_generator()
        )


@pytest.mark.parametrize("statistic", ["probes", "virtual", "GraSP", "ZiCo"])
def test_frozen_weights(statistic):
    model = fold_batchnorm(Small()).requires_grad_(False)
    _refused(UnsupportedModelError, r"\['conv', 'fc'\] are frozen", STATISTICS[statistic], model, NAMES, _split())


@pytest.mark.parametrize("statistic", ["moments", "probes", "virtual", "positive", "products", "GraSP"])
def test_outputs_that_do_not_depend_on_a_layer(statistic):
    model = fold_batchnorm(Small(function=lambda y: y.detach()))
    message = "does not depend on layer 'conv'"
    _refused(UnsupportedModelError, message, STATISTICS[statistic], model, NAMES, _split())


def test_one_image_has_no_standard_error_and_equal_outputs_no_similarity():
    model = fold_batchnorm(Small())
    _refused(InvalidParameterError, "must be a whole number, 2 or more", STATISTICS["traces"], model, NAMES, _split(1))
    _refused(InvalidParameterError, "two minibatches of 3", STATISTICS["ZiCo"], model, NAMES, _split(5))
    with torch.no_grad():
        model.conv.weight.zero_()
    _refused(UnsupportedModelError, "'conv' has the same output for all 6", STATISTICS["CKA"], model, NAMES, _split())


def _rounded(model, names):
    return {name: [fake_quantize(model.get_submodule(name).weight, bits) for bits in (2, 3)] for name in names}


PASSES = (passes.one_slot_logits, passes.pair_losses)


@pytest.mark.parametrize("call", PASSES)
@pytest.mark.parametrize(
    ("members", "change", "error", "message"),
    [
        ([], lambda q: q, InvalidParameterError, "need the names"),
        ([["conv"], []], lambda q: q, InvalidParameterError, "one layer or more"),
        ([["conv"], ["conv"]], lambda q: q, InvalidParameterError, "each once"),
        ([["stem"], ["fc"]], lambda q: q, UnsupportedModelError, "'stem' is no convolution"),
        ([["conv"], ["fc"]], lambda q: {"conv": q["conv"]}, InvalidParameterError, r"\['fc'\] have no quantized"),
        ([["conv"], ["fc"]], lambda q: q | {"fc": q["fc"][:1]}, InvalidParameterError, "one weight for each choice"),
        ([["conv"], ["fc"]], lambda q: q | {"fc": [], "conv": []}, InvalidParameterError, "one weight for each"),
        ([["conv"], ["fc"]], lambda q: q | {"fc": [w.T for w in q["fc"]]}, InvalidParameterError, "its shape"),
        (
            [["conv"], ["fc"]],
            lambda q: q | {"fc": [q["fc"][0], q["fc"][1] * torch.nan]},
            UnsupportedModelError,
            r"\['fc'\] at choice 1 hold NaN",
        ),
        (
            [["conv"], ["fc"]],
            lambda q: q | {"conv": [q["conv"][0] * torch.inf, q["conv"][1]]},
            UnsupportedModelError,
            r"\['conv'\] at choice 0 hold NaN",
        ),
    ],
)
def test_weights_that_no_slot_can_take(call, members, change, error, message):
    model = fold_batchnorm(Small())
    quantized = change(_rounded(model, NAMES))
    _refused(error, message, lambda m, s: call(m, members, quantized, s), model, _split())


@pytest.mark.parametrize("call", PASSES)
def test_networks_that_cannot_be_run_in_pieces(call):
    def run(model, split):
        return call(model, [["conv"], ["fc"]], _rounded(model, NAMES), split)

    _refused(UnsupportedModelError, "must be traced", run, Small().eval(), _split())
    writes = torch.fx.symbolic_trace(_Overwriting().eval())
    _refused(UnsupportedModelError, "overwrites what layers", run, writes, _split())
    broken = fold_batchnorm(Small())
    with torch.no_grad():
        broken.fc.bias.fill_(torch.nan)
    _refused(UnsupportedModelError, "of the float network hold NaN", run, broken, _split())
    _refused(InvalidParameterError, "number of images", run, fold_batchnorm(Small()), _split(0))
    if call is passes.pair_losses:
        _refused(InvalidParameterError, "label 3", run, fold_batchnorm(Small()), _labelled(3))


class _Overwriting(Small):
    """Normalizes its input in place."""

    def forward(self, x):
        return super().forward(x.sub_(0.5))


@pytest.mark.parametrize("call", [passes.divergences, passes.logit_products])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 6, 3), (0, 3, 5, 3)])
def test_logits_of_other_shapes(call, shape):
    with pytest.raises(InvalidParameterError, match="must be"):
        call(torch.ones(5, 3), torch.ones(shape))


TABLE, CONFIGS, CHOICES = np.arange(6.0).reshape(2, 3), np.array([[2, 4], [3, 3]]), (2, 3, 4)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (TABLE * 1j, "must be real numbers, got an array of complex"),
        (TABLE.astype(str), "must be real numbers, got an array of <U"),
        (TABLE.astype(object), "got an array of object"),
        (None, "got an array of object"),
        ([[1, 2, 3], [1, 2]], "make no array"),
        (np.full((2, 3), np.nan), r"NaN or infinity at position \(0, 0\)"),
        (np.array([[1, 2, 3], [1, np.inf, 3]]), r"position \(1, 1\)"),
        (np.ones(3), "2 axes"),
        (np.ones((2, 2)), "neither a table"),
        (np.ones((7, 7)), "neither a table"),
        (np.ones((6, 9)), "neither a table"),
        (np.ones((0, 3)), "neither a table"),
        (np.ones((2, 0)), "neither a table"),
    ],
)
def test_scores_that_are_none(scores, message):
    with pytest.raises(InvalidScoreError, match=message):
        score(scores, CONFIGS, CHOICES)


@pytest.mark.parametrize(
    ("configs", "choices", "aggregation", "error"),
    [
        (CONFIGS, CHOICES, "product", InvalidParameterError),
        (CONFIGS, CHOICES, None, InvalidParameterError),
        (CONFIGS, CHOICES, ["sum"], InvalidParameterError),
        (CONFIGS, (), "sum", InvalidBitsError),
        (CONFIGS, (4, 3, 2), "sum", InvalidBitsError),
        (CONFIGS, (2, 3, 2.5), "sum", InvalidBitsError),
        (CONFIGS, None, "sum", InvalidBitsError),
        (CONFIGS[:, :1], CHOICES, "sum", ConfigLengthError),
        (CONFIGS + 1, CHOICES, "sum", InvalidBitsError),
        (CONFIGS + 0.5, CHOICES, "sum", InvalidBitsError),
    ],
)
def test_configurations_that_have_no_score(configs, choices, aggregation, error):
    with pytest.raises(error):
        score(TABLE, configs, choices, aggregation=aggregation)


class _Statistics:
    names, slot_names, slot_count, choices = ["a", "b"], ["a", "b"], 2, CHOICES


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE * 1j, "must be real numbers"),
        (TABLE.astype(str), "must be real numbers"),
        (None, "must be real numbers"),
        ([[1], [2, 3]], "make no array"),
        (np.ones((3, 3)), "returned shape"),
        (np.ones(3), "returned shape"),
        (np.array([[1, 2, 3], [1, np.nan, 3]]), "not finite at layer 'b'"),
        (np.array([[1, -np.inf, 3], [1, 2, 3]]), "not finite at layer 'a'"),
        (np.tile([[1.0], [2.0]], (1, 3)), "same score"),
    ],
)
def test_proxies_that_return_no_scores(table, message, monkeypatch):
    monkeypatch.setitem(PROXIES, "broken", Proxy("broken", "trivial", (), lambda _statistics: table))
    with pytest.raises(InvalidScoreError, match=message):
        score_table("broken", _Statistics())


@pytest.mark.parametrize("name", ["", "Bit sum", None, 3, ["bit sum"]])
def test_proxies_that_there_are_not(name):
    with pytest.raises(InvalidScoreError, match="registered proxies: bit sum"):
        score_table(name, _Statistics())


X, Y, RNG = np.arange(40.0), np.arange(40.0) ** 2 % 37, np.random.default_rng(0)
BAD_SCORES = {
    "text": X.astype(str),
    "complex": X * 1j,
    "None": None,
    "objects": X.astype(object),
    "NaN": np.where(X == 3, np.nan, X),
    "infinite": np.where(X == 3, np.inf, X),
    "equal": np.ones(40),
    "shorter": X[:-1],
    "a table": X[None],
    "two": X[:2],
}
RANKINGS = {
    "spearman": lambda x, y: ranking.spearman(x, y),
    "rho_at": lambda x, y: ranking.rho_at(x, y, 50),
    "fitness": lambda x, y: ranking.fitness(x, y),
    "kendall": lambda x, y: ranking.kendall(x, y),
    "weighted_tau": lambda x, y: ranking.weighted_tau(x, y),
    "logit_pearson": lambda x, y: ranking.logit_pearson(x, y),
    "partial_rho": lambda x, y: ranking.partial_rho(x, y, np.ones((40, 1))),
    "regret": lambda x, y: ranking.regret(x, y, X, 20.0),
    "bootstrap_rho": lambda x, y: intervals.bootstrap_rho(x, y, rng=RNG),
    "bootstrap": lambda x, y: intervals.bootstrap(ranking.kendall, x, y, rng=RNG),
    "compare": lambda x, y: intervals.compare(x, X, y, rng=RNG),
    "bootstrap_partial_rho": lambda x, y: intervals.bootstrap_partial_rho(x, y, np.ones((40, 1)), rng=RNG),
    "bootstrap_binned_rho": lambda x, y: intervals.bootstrap_binned_rho(x, y, X, rng=RNG),
    "bootstrap_regret": lambda x, y: intervals.bootstrap_regret(x, y, X, 20.0, rng=RNG),
    "noise_ceiling": lambda x, y: intervals.noise_ceiling(x, y, rng=RNG),
}


@pytest.mark.parametrize("bad", BAD_SCORES)
@pytest.mark.parametrize("statistic", RANKINGS)
def test_scores_that_rank_nothing(statistic, bad):
    kept = copy.deepcopy(BAD_SCORES[bad])
    for pair in ((BAD_SCORES[bad], Y), (Y, BAD_SCORES[bad])):
        with pytest.raises(InvalidScoreError):
            RANKINGS[statistic](*pair)
    np.testing.assert_array_equal(kept, BAD_SCORES[bad])


NO_NUMBERS = [np.nan, np.inf, None, "5", 1j, True, [5], 10**400]


@pytest.mark.parametrize("bad", [*NO_NUMBERS, 0, -1, 1.0, 95])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: intervals.bootstrap_rho(X, Y, level=v, rng=RNG),
        lambda v: intervals.bootstrap(ranking.kendall, X, Y, level=v, rng=RNG),
        lambda v: intervals.bootstrap_partial_rho(X, Y, (X**2 % 7)[:, None], level=v, rng=RNG),
        lambda v: intervals.bootstrap_binned_rho(X, Y, Y, bins=2, level=v, rng=RNG),
        lambda v: intervals.bootstrap_regret(X, Y, X, 20.0, level=v, rng=RNG),
        lambda v: intervals.sampling_interval(0.5, 30, level=v),
        lambda v: intervals.Comparison(0.1, 0, 1, 0.5, 0.1, 50).configs_to_separate(power=v),
        lambda v: intervals.Comparison(0.1, 0, 1, 0.5, 0.1, 50).configs_to_separate(level=v),
    ],
)
def test_levels_that_are_none(call, bad):
    with pytest.raises(InvalidParameterError, match="must lie"):
        call(bad)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, 0, -1, 99, 100.0])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: intervals.bootstrap_rho(X, Y, resamples=v, rng=RNG),
        lambda v: intervals.bootstrap(ranking.kendall, X, Y, resamples=v, rng=RNG),
        lambda v: intervals.compare(X, Y, X, resamples=v, rng=RNG),
        lambda v: intervals.bootstrap_partial_rho(X, Y, (X**2 % 7)[:, None], resamples=v, rng=RNG),
        lambda v: intervals.bootstrap_regret(X, Y, X, 20.0, resamples=v, rng=RNG),
        lambda v: intervals.noise_ceiling(X, Y, resamples=v, rng=RNG),
    ],
)
def test_resamples_that_are_none(call, bad):
    with pytest.raises(InvalidParameterError, match="must be a whole number, 100 or more"):
        call(bad)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, 0, -5, 100.5])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: ranking.rho_at(X, Y, v),
        lambda v: ranking.fitness(X, Y, (50, v)),
        lambda v: ranking.fitness_many(X[None], Y, (50, v)),
        lambda v: intervals.bootstrap_rho(X, Y, percent=v, rng=RNG),
        lambda v: intervals.compare(X, Y, X, percent=v, rng=RNG),
    ],
)
def test_shares_that_are_none(call, bad):
    with pytest.raises(InvalidParameterError, match="a share in percent must"):
        call(bad)


@pytest.mark.parametrize("rng", [None, 0, np.random, np.random.RandomState(0), _generator()])  # noqa: NPY002
@pytest.mark.parametrize(
    "call",
    [
        lambda rng: intervals.bootstrap_rho(X, Y, rng=rng),
        lambda rng: intervals.compare(X, Y, X, rng=rng),
        lambda rng: intervals.bootstrap_regret(X, Y, X, 20.0, rng=rng),
    ],
)
def test_streams_that_are_none(call, rng):
    with pytest.raises(InvalidParameterError, match=r"numpy\.random\.Generator"):
        call(rng)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: intervals.sampling_interval(1.0, 30), InvalidParameterError),
        (lambda: intervals.sampling_interval(np.nan, 30), InvalidParameterError),
        (lambda: intervals.sampling_interval("0.5", 30), InvalidParameterError),
        (lambda: intervals.sampling_interval(None, 30), InvalidParameterError),
        (lambda: intervals.sampling_interval(0.5, 3), InvalidParameterError),
        (lambda: intervals.sampling_interval(0.5, 30.5), InvalidParameterError),
        (lambda: intervals.sampling_interval(0.5, np.nan), InvalidParameterError),
        (lambda: intervals.sampling_interval(0.5, "30"), InvalidParameterError),
        (lambda: ranking.regret(X, Y, X, np.nan), InvalidParameterError),
        (lambda: ranking.regret(X, Y, X, None), InvalidParameterError),
        (lambda: ranking.regret(X, Y, X, "20"), InvalidParameterError),
        (lambda: ranking.regret(X, Y, X, -1), InvalidScoreError),
        (lambda: ranking.regret(X, Y, X * 1j, 20), InvalidScoreError),
        (lambda: ranking.regret(X, Y, X[:-1], 20), InvalidScoreError),
        (lambda: ranking.regret(X, Y, X * np.nan, 20), InvalidScoreError),
        (lambda: ranking.regret(X, Y, X[:, None], 20), InvalidScoreError),
        (lambda: ranking.logit_pearson(X, Y, images=0), InvalidParameterError),
        (lambda: ranking.logit_pearson(X, Y, images=None), InvalidParameterError),
        (lambda: ranking.logit_pearson(X, Y - 1), InvalidScoreError),
        (lambda: ranking.logit_pearson(X, Y * 10), InvalidScoreError),
        (lambda: ranking.fitness(X, Y, ()), InvalidParameterError),
        (lambda: ranking.fitness(X, Y, 50), InvalidParameterError),
        (lambda: ranking.fitness(X, Y, "50"), InvalidParameterError),
        (lambda: ranking.fitness_many(X, Y), InvalidScoreError),
        (lambda: ranking.fitness_many(X[None] * 1j, Y), InvalidScoreError),
        (lambda: ranking.fitness_many(X[None], Y * np.nan), InvalidScoreError),
        (lambda: ranking.fitness_many(np.ones((0, 40)), Y), InvalidScoreError),
        (lambda: ranking.partial_rho(X, Y, X), InvalidScoreError),
        (lambda: ranking.partial_rho(X, Y, X[:-1, None]), InvalidScoreError),
        (lambda: ranking.partial_rho(X, Y, X[:, None] * np.nan), InvalidScoreError),
        (lambda: ranking.partial_rho(X, Y, X[:, None].astype(str)), InvalidScoreError),
        (lambda: intervals.bootstrap_binned_rho(X, Y, X[:-1], rng=RNG), InvalidScoreError),
        (lambda: intervals.bootstrap_binned_rho(X, Y, X, bins=0, rng=RNG), InvalidParameterError),
        (lambda: intervals.bootstrap_binned_rho(X, Y, X, bins=2.5, rng=RNG), InvalidParameterError),
        (lambda: intervals.bootstrap_binned_rho(X, Y, X, bins=None, rng=RNG), InvalidParameterError),
        (lambda: intervals.bootstrap_binned_rho(X, Y, X, bins=9, rng=RNG), InvalidScoreError),
        (lambda: intervals.holm([0.5, np.nan]), InvalidParameterError),
        (lambda: intervals.holm([0.5, 1.1]), InvalidParameterError),
        (lambda: intervals.holm(["0.5"]), InvalidScoreError),
        (lambda: intervals.holm(0.5), InvalidScoreError),
        (lambda: intervals.holm(None), InvalidScoreError),
        (lambda: oracles.pair_interactions(CONFIGS, [1, 2], CHOICES), InvalidScoreError),
        (lambda: oracles.pair_interactions(CONFIGS, [1, np.nan], CHOICES), InvalidScoreError),
        (lambda: oracles.pair_interactions(CONFIGS, ["1", "2"], CHOICES), InvalidScoreError),
        (lambda: oracles.pair_interactions(CONFIGS, [1, 2], (3, 2)), InvalidBitsError),
        (lambda: oracles.pair_interactions(CONFIGS + 3, [1, 2], CHOICES), InvalidBitsError),
        (lambda: oracles.resample_layers(TABLE, 0), InvalidParameterError),
        (lambda: oracles.resample_layers(TABLE, 2.5), InvalidParameterError),
        (lambda: oracles.resample_layers(TABLE * np.nan, 2), InvalidScoreError),
        (lambda: oracles.resample_layers(TABLE[0], 2), InvalidScoreError),
        (lambda: oracles.resample_layers(TABLE[:0], 2), InvalidScoreError),
    ],
)
def test_other_numbers_that_are_none(call, error):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, EMQError)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("oracle", [oracles.additive_oracle, oracles.pairwise_oracle])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c, y: (c, y.astype(str), c, CHOICES), InvalidScoreError),
        (lambda c, y: (c, y * 1j, c, CHOICES), InvalidScoreError),
        (lambda c, y: (c, np.where(y == y[0], np.nan, y), c, CHOICES), InvalidScoreError),
        (lambda c, y: (c, y * 0, c, CHOICES), InvalidScoreError),
        (lambda c, y: (c, y[1:], c, CHOICES), InvalidScoreError),
        (lambda c, y: (c, None, c, CHOICES), InvalidScoreError),
        (lambda c, y: (c, y, c, ()), InvalidBitsError),
        (lambda c, y: (c, y, c, (4, 3, 2)), InvalidBitsError),
        (lambda c, y: (c, y, c[:, :2], CHOICES), ConfigLengthError),
        (lambda c, y: (c + 1, y, c, CHOICES), InvalidBitsError),
    ],
)
def test_benches_that_no_oracle_can_be_fitted_to(oracle, change, error):
    rng = np.random.default_rng(0)
    configs, accuracy = rng.choice(CHOICES, size=(30, 3)), rng.normal(size=30)
    with pytest.raises(error):
        oracle(*change(configs, accuracy))
