"""Hand-made proxies as points of the space: the same scores as by hand, on tied layers and on every published study."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from test_search_space import CHOICES, SHAPES, make_statistics

from book.studies.networks import layer_table, load_checkpoint
from book.studies.study import study_folder
from emq_lib.bench.table import read_bench
from emq_lib.core.files import vouched_path
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import get_profile, profile_names
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.genotypes import KNOWN, parse
from emq_lib.evolution.spaces import Space
from emq_lib.proxies.handmade import score_table
from emq_lib.proxies.layer_statistics import assemble_statistics, sampled
from emq_lib.proxies.scores import score

DECIBELS = {"SQNR": 20 / np.log(10)}  # by hand; natural logarithms as a genotype
SUMS_OVER_WEIGHTS = ("HAWQ-V2", "EMQ", "Fisher error", "relative weight error", "SQNR")
SUMS_OVER_WEIGHTS += ("bit-SNIP", "bit-Synflow", "bit-plain", "bit-Fisher", "bit-grad-norm", "bit-L2")
TIES = {"last two": (0, 1, 1), "first and last": (0, 1, 0), "none": (0, 1, 2)}


def tie(statistics, slots):
    """Return statistics whose layers share these slots; what is known of slots is that of the first ones."""
    count = max(slots) + 1
    options = count * len(CHOICES)
    return dataclasses.replace(
        statistics,
        slots=np.array(slots),
        kl=statistics.kl[:count],
        loss=statistics.loss[:count],
        logit_products=statistics.logit_products[:options, :options],
        pair_losses=statistics.pair_losses[:options, :options],
    )


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", KNOWN)
def test_the_same_scores_as_by_hand_whatever_layers_are_tied(name, ties):
    statistics = tie(make_statistics(), TIES[ties])
    found, truth = Evaluator(statistics).scores(KNOWN[name]), score_table(name, statistics)
    np.testing.assert_allclose(found * DECIBELS.get(name, 1.0), truth, rtol=1e-4, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["sequential", "branched", "dag"]), st.integers(0, 100_000))
def test_what_is_known_of_slots_does_not_see_how_many_layers_they_have(structure, seed):
    """Formulas of widths, divergences, losses and pairs: three slots of six layers score like three layers."""
    genotype = Space(structure, ("b", "K", "L", "P", "D")).random(np.random.default_rng(seed))
    alone = make_statistics()
    shared = dataclasses.replace(
        make_statistics(1, SHAPES * 2),
        **{name: getattr(alone, name) for name in ("kl", "loss", "logit_products", "pair_losses")},
        slots=np.array([0, 1, 2, 2, 0, 1]),
    )
    np.testing.assert_array_equal(Evaluator(shared).scores(genotype), Evaluator(alone).scores(genotype))


def test_where_slots_meet_layers_each_counts_as_often_as_it_is_there():
    statistics = tie(make_statistics(), TIES["last two"])
    squares = statistics.per_slot(np.stack([e.double().square().sum(dim=(1, 2)).numpy() for e in statistics.errors]))
    bits = np.array(CHOICES)
    for text, truth in (
        ("branched(sum; K: no_op; E: pow2, sum; no_op)", statistics.kl + squares),
        ("branched(ratio; K: sqrt; E: pow2, sum; no_op)", np.sqrt(statistics.kl) / squares),
        ("branched(product; b: pow2; n: no_op; no_op)", bits**2 * statistics.per_slot(statistics.parameters)[:, None]),
        ("dag(K, O; no_op, no_op)", statistics.kl + statistics.per_slot(statistics.output_error)),
        ("branched(sum; P: sum; O: no_op; no_op)", None),
    ):
        found = Evaluator(statistics).scores(parse(text))
        if truth is None:
            pairs = Evaluator(statistics).scores(parse("sequential(P: sum)"))
            truth = pairs + statistics.per_slot(statistics.output_error)
        np.testing.assert_allclose(found, truth, rtol=1e-4, err_msg=text)


def test_gradients_beyond_single_precision_keep_their_ranks():
    """Synflow's gradients of deep networks pass the largest float32."""
    plain = make_statistics()
    huge = dataclasses.replace(plain, positive_gradients=tuple(r.double() * 1e45 for r in plain.positive_gradients))
    configs = np.array(list(itertools.product(CHOICES, repeat=3)))
    for text in (str(KNOWN["bit-Synflow"]), "sequential(bR: pow2, sum)", "sequential(bR: frobenius)"):
        one, two = (Evaluator(statistics).score(parse(text), configs) for statistics in (plain, huge))
        assert np.isfinite(two).all()
        np.testing.assert_array_equal(np.argsort(one), np.argsort(two))


@pytest.fixture(
    scope="module",
    params=[name for name in profile_names() if (study_folder(get_profile(name)) / "statistics.safetensors").is_file()],
)
def published(request):
    """Statistics of a published study, up to date or not, and some of its configurations."""
    profile = get_profile(request.param)
    folder = study_folder(profile)
    model = fold_batchnorm(load_checkpoint(profile, vouched_path(folder, "model.safetensors")))
    stored = load(vouched_path(folder, "statistics.safetensors").read_bytes())
    statistics = assemble_statistics(model, layer_table(model, profile), stored, profile.choices, {})
    table = read_bench(vouched_path(folder, "bench.parquet"))
    return statistics, np.stack(table[table["sample"] == "random"]["bits"])[:400]


def by_hand_on_the_sample(name, statistics):
    """Return a proxy's table by its definition, from the numbers of each layer that formulas see."""
    rows = []
    for layer, count in enumerate(statistics.parameters):
        weights, errors = sampled(statistics.weights[layer]).double(), sampled(statistics.errors[layer]).double()
        g, h, r, v, c = (
            getattr(statistics, field)[layer].double()
            for field in ("gradients", "curvature", "positive_gradients", "virtual_gradients", "channel_products")
        )
        share = count / weights.numel()
        for bits, e in zip(statistics.choices, errors, strict=True):
            squares = share * e.square().sum()
            shares = (bits * v).abs().where(v != 0, torch.tensor(1.0)).log().softmax(dim=0)
            rows.append(
                {
                    "HAWQ-V2": lambda s=squares, layer=layer, n=count: -statistics.trace[layer] / n * s,
                    "EMQ": lambda w=weights, b=bits, p=shares: p.mean() * (b * w).clamp(min=0).sqrt().mean(),
                    "Fisher error": lambda h=h, e=e, f=share: -f * (h * e.square()).sum(),
                    "relative weight error": lambda e=e, w=weights: -e.square().sum() / w.square().sum(),
                    "SQNR": lambda e=e, w=weights: 10 * (w.square().sum() / e.square().sum()).log10(),
                    "bit-SNIP": lambda b=bits, w=weights, g=g, f=share: f * b * (w * g).abs().sum(),
                    "bit-Synflow": lambda b=bits, w=weights, r=r, f=share: f * b * (w * r).abs().sum(),
                    "bit-plain": lambda b=bits, w=weights, g=g, f=share: f * b * (w * g).sum(),
                    "bit-Fisher": lambda b=bits, c=c: b * c.square().sum() / (2 * c.shape[1]),
                    "bit-grad-norm": lambda b=bits, g=g, f=share: b * (f * g.square().sum()).sqrt(),
                    "bit-L2": lambda b=bits, w=weights, f=share: b * (f * w.square().sum()).sqrt(),
                }[name]()
            )
    return statistics.per_slot(np.array([float(row) for row in rows]).reshape(-1, len(statistics.choices)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_on_every_study_a_genotype_ranks_as_the_proxy_by_hand(name, published):
    """On the numbers that formulas see, which are all but for proxies that add up over the weights of large layers."""
    statistics, configs = published
    found = Evaluator(statistics).scores(KNOWN[name]) * DECIBELS.get(name, 1.0)
    truth = (by_hand_on_the_sample if name in SUMS_OVER_WEIGHTS else score_table)(name, statistics)
    np.testing.assert_allclose(found, truth, rtol=2e-4, atol=1e-6 * np.abs(truth).max())
    one, two = (score(table, configs, statistics.choices) for table in (found, truth))
    order = np.argsort(one, kind="stable")
    assert (
        np.diff(two[order]) > -1e-5 * np.ptp(two)
    ).all()  # in order, but for what single precision cannot tell apart
