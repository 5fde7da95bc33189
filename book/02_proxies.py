# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 02 Proxies: ranking configurations without measuring them
#
# **Question.** How well do scores that need no training rank configurations, and how sure can one be of it?
#
# **Answer.** On {glue:text}`heldout_n:.0f` configurations that no choice was made on, counting bits reaches rho
# {glue:text}`bit_sum_rho:.2f` (95 % interval {glue:text}`bit_sum_rho_lo:.2f` to {glue:text}`bit_sum_rho_hi:.2f`). The best proxy that is a
# sum over layers, chosen on the search half, reaches {glue:text}`best_rho:.2f` ({glue:text}`best_rho_lo:.2f` to {glue:text}`best_rho_hi:.2f`).
# Layers interact: a proxy with a term for every pair of layers, CLADO, reaches {glue:text}`pairs_rho:.2f`
# ({glue:text}`pairs_rho_lo:.2f` to {glue:text}`pairs_rho_hi:.2f`). An additive model that is told measured accuracies reaches
# {glue:text}`oracle_rho:.2f`.

# %% [markdown]
# | you need | |
# |---|---|
# | earlier chapters | [01](01_bench.ipynb) |
# | files read | `bench.parquet`, `statistics.safetensors`, `proxies.parquet`, `proxies.json`, `heldout.csv` of the study; `heldout.csv` of the others; `benchmarks/curvature.json` |
# | with `REBUILD = True` | passes the calibration images through the network, too |

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # study to show
REBUILD: bool = False  # True: compute the study here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scikit_posthocs
import torch
import torch.nn.functional as F

from book.making.chapter import start_chapter
from book.making.palette import COLOURS, PLAIN
from book.making.plots import (
    plot_forest,
    plot_forests,
    plot_quality,
    plot_scatter,
    plot_sensitivity,
)
from book.making.tables import show_source, show_table, with_interval
from book.places import REPOSITORY
from book.studies import proxies
from book.studies.bench import load_bench
from book.studies.heldout import build_heldout, load_heldout, load_tables
from book.studies.images import load_dataset
from book.studies.networks import load_checkpoint
from book.studies.study import checked_path, has_study
from emq_lib.core.costs import gather
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import QUANTIZERS, profile_names
from emq_lib.core.quantizers import fake_quantize
from emq_lib.proxies import (
    curvature,
    handmade,
    intervals,
    layer_statistics,
    ranking,
)
from emq_lib.proxies.scores import score

chapter = start_chapter("02_proxies", PROFILE, REBUILD, SEED)

# %%
if chapter.rebuild:
    images = load_dataset(chapter.profile)
    proxies.build_statistics(chapter.profile, images.calibration)
    proxies.build_proxies(chapter.profile)
    build_heldout(chapter.profile)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One proxy by hand
#
# The loss of a trained network sits near a minimum, so a small change $E$ of the weights changes it by about
# $\tfrac12 E^\top \mathbf{H} E$. If the Hessian $\mathbf{H}$ of a layer were a multiple of the identity, its trace $\operatorname{tr}\mathbf{H}$
# divided by the number of weights $P$ would be that multiple. This is HAWQ-V2 {cite:p}`hawqv2`:
#
# $$T[l, b] = -\frac{\operatorname{tr}\mathbf{H}_l}{P_l}\,\lVert Q_b(W_l) - W_l\rVert^2.$$
#
# The sign makes a higher score mean a higher expected accuracy, which is the rule for every proxy in this book. On one layer of the digits
# network, the error first:

# %%
digits = chapter.study("digits-resnet8")
data = load_dataset(digits)
model = fold_batchnorm(
    load_checkpoint(digits, checked_path(digits, "model.safetensors"))
)
name = "layer1.0.conv1"
weight = model.get_submodule(name).weight.detach()
squared = torch.stack(
    [
        (fake_quantize(weight, bits) - weight).square().sum()
        for bits in digits.choices
    ]
)
squared

# %% [markdown]
# Now the trace. The logits of a network of ReLUs are piecewise linear in the weights of any one layer, so the layer's Hessian is
# $J^\top S J$, with $J$ the Jacobian of the logits and $S = \operatorname{diag}(p) - pp^\top$ the Hessian of the cross-entropy at the
# logits. One backward pass per class gives the traces of all layers at once, exactly; two passes with random combinations
# of the classes give them with little more noise than the choice of images brings anyway.

# %%
show_source(curvature.hessian_traces)

# %% [markdown] slideshow={"slide_type": "slide"}
# Is that true? On a few images the whole Hessian of this small layer fits into memory, so compute it densely and compare.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
few = data.calibration[:4]


def loss_of(weight: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy on a few images as a function of one layer's weight."""
    logits = torch.func.functional_call(
        model, {f"{name}.weight": weight}, (few.inputs(),)
    )
    return F.cross_entropy(logits, few.labels)


dense = torch.func.hessian(loss_of)(weight).reshape(
    weight.numel(), weight.numel()
)
trace, _ = curvature.hessian_traces(
    model,
    [name],
    few,
    combinations=None,
    generator=digits.generator("chapter 02"),
)
assert np.isclose(trace[0], dense.trace().item(), rtol=1e-3)
dense.trace().item(), trace[0]

# %% [markdown] slideshow={"slide_type": "slide"}
# By name, for all layers, from the statistics of the study, and then by what the rest of the book uses: a score table. The
# score of a configuration is the sum of the entries that it selects, so scoring all configurations is one gather.

# %%
statistics = proxies.load_statistics(digits)
table = handmade.score_table("HAWQ-V2", statistics)
by_hand = -statistics.trace[0] / weight.numel() * squared.numpy()
assert np.allclose(table[0], by_hand, rtol=1e-3)
table[0]

# %% slideshow={"slide_type": "-"}
show_source(handmade.hawq_v2, gather)

# %% [markdown]
# A trace is an average over images, so it has a standard error, which nobody prints. For the study's layers, in percent of the trace:

# %%
own = proxies.load_statistics(chapter.profile)
errors = pd.Series(100 * own.trace_error / own.trace, index=own.names)
chapter.claim(
    "trace_error",
    f"On {chapter.profile.calibration_images:,} images the median standard error of a layer's trace is {{:.0f}} % of it.",
    errors.median(),
    within=(0.5, 60),
    n=len(errors),
)

# %% [markdown]
# The usual way is random probes $v^\top \mathbf{H} v$, one product with the Hessian each. `make benchmarks` runs two libraries that do it
# layer by layer, until their standard error is as small as that of one call here:

# %%
timed = json.loads((REPOSITORY / "benchmarks" / "curvature.json").read_text())
at_equal_error = timed["cifar10-resnet20"]
chapter.claim(
    "trace_speed",
    "PyHessian takes {:.0f} times as long on ResNet-20; "
    f"curvlinops {at_equal_error['curvlinops']['ratio']:.0f} times.",
    at_equal_error["pyhessian"]["ratio"],
    within=(4, 200),
    n=at_equal_error["layers"],
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Layers are not alone
#
# A sum over layers says that what a layer costs does not depend on the others. Write $d_i$ for the change of the logits when layer $i$ alone is
# quantized at some width. If the changes add up, the divergence of the predictions from the float ones is, to second order,
#
# $$\tfrac12\Bigl(\sum_i d_i\Bigr)^{\!\top} S \Bigl(\sum_j d_j\Bigr) = \tfrac12\sum_{i,j} d_i^\top S\, d_j,$$
#
# a sum over *pairs*. The passes that measure each layer alone give all $d_i$, and products of them give all pairs: no pass more than for the
# one-layer divergence. CLADO {cite:p}`clado` instead measures the loss for every pair of layers and every pair of widths.

# %%
show_source(handmade.added_logit_changes, handmade.clado, score)

# %% [markdown] slideshow={"slide_type": "slide"}
# Do pairs matter? On the digits, what two layers at 2 bits do together, beyond the sum of both, as a share of that sum:

# %% slideshow={"slide_type": "-"}
lowest = statistics.pair_losses[::3, ::3]
alone = np.diag(lowest)
beyond = (lowest - np.diag(alone)) / (alone[:, None] + alone[None, :])
show_table(
    pd.DataFrame(
        100 * beyond, columns=statistics.names, index=statistics.names
    ).reset_index(names="percent"),
    decimals=0,
)

# %% [markdown]
# ## All of them
#
# Every proxy is one function; its first line says what an entry of its table, or of its matrix of pairs, is. $l$ counts layers, $s$ slots (layers
# that share their bits), $b$ is the width, $E_{lb}$ the quantization error, $G$ the gradient.

# %%
listed = [
    entry
    for entry in handmade.PROXIES.values()
    if entry.variant != "as_released"
]
show_table(
    pd.DataFrame(
        {
            "proxy": [entry.name for entry in listed],
            "variant": [entry.variant for entry in listed],
            "what it is": [
                entry.scores.__doc__.splitlines()[0] for entry in listed
            ],
        }
    )
)

# %% [markdown]
# These are the methods computed as published, with trained weights and every layer at its own bits. What the released code does differs from
# that in several places; the [appendix](as_released.ipynb) shows what each slip does to the ranking.
#
# ## Which layers matter, and who knows it
#
# The bench has configurations in which one layer of uniform 3 bits goes to 2. What they lose on the test images is the truth about single
# layers; each row below is what a method says of the same step, as a share of the row's largest.

# %%
tables = load_tables(chapter.profile)
one_off = load_bench(chapter.profile).select("one-off").table
uniform = load_bench(chapter.profile).query((3,) * own.slot_count)
dropped = np.zeros(own.slot_count)
for row in one_off.itertuples():
    changed = int(np.flatnonzero(np.array(row.bits) != 3)[0])
    if row.bits[changed] == 2:
        dropped[changed] = max(0.0, uniform.top1 - row.top1)
shown = [
    "bit sum",
    "parameter bits",
    "bit-SNIP",
    "bit-Synflow",
    "HAWQ",
    "HAWQ-V2",
    "Fisher error",
    "relative weight error",
    "relative output error",
    "one-layer KL",
    "additive oracle",
]
steps = pd.DataFrame(
    {
        name: np.maximum(np.diff(tables[name]["table"])[:, 0], 0)
        for name in shown
    }
    | {"measured": dropped}
).T
steps.columns = own.slot_names

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "What 2 bits instead of 3 cost in each layer, as a share of the most expensive one: ten methods, and what was measured (bottom). Counting bits or parameters says nothing or the opposite; methods that look at outputs know the early layers.", "name": "fig-02-1"}, "image": {"alt": "A grid of shaded squares, one row per method and one column per layer, darker where a layer matters more; the measured row is at the bottom."}}
figure, ax = plt.subplots(figsize=(6.5, 4.2))
plot_sensitivity(steps.div(steps.max(axis=1), axis=0), ax=ax)
plt.show()

# %%
agreement = steps.drop("measured").apply(
    lambda row: row.corr(steps.loc["measured"], method="spearman"), axis=1
)
known = agreement.dropna().sort_values(ascending=False)
ends = [
    intervals.sampling_interval(np.clip(rho, -0.999, 0.999), len(dropped))
    for rho in known
]
shares = pd.DataFrame({"proxy": known.index, "rho": known.to_numpy()}).assign(
    lo=[lo for lo, _ in ends], hi=[hi for _, hi in ends]
)
show_table(
    shares[["proxy"]].assign(
        **{"rho with measured": with_interval(shares, "rho", "lo", "hi")},
        layers=len(dropped),
    )
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Two halves
#
# The random configurations are cut once into a *search half* and a *held-out half*; so is the stratified sample, which is spread evenly in
# size. Fitting, choosing and evolving look at the first only; every correlation that this book prints is measured on the second.

# %% slideshow={"slide_type": "-"}
bench = load_bench(chapter.profile)
search, heldout = bench.split()
scores = {
    name: score(entry["table"], heldout.configs, chapter.profile.choices)
    for name, entry in tables.items()
    if entry["variant"] in ("trivial", "corrected")
}
chapter.claim(
    "heldout_n",
    "The held-out half has {:.0f} configurations.",
    len(heldout),
    within=(30, 10_000),
)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Measured top-1 against score, one point per held-out configuration. Counting bits gives a cloud, the one-layer divergence a band, and pairs of layers a narrower one.", "name": "fig-02-2"}, "image": {"alt": "Three scatter plots of top-1 against score: bit sum is a wide cloud, the square root of the one-layer divergence a band, CLADO a narrow band."}}
figure, axes = plt.subplots(1, 3, figsize=(6.5, 2.8), sharey=True)
for ax, proxy in zip(
    axes, ("bit sum", "sqrt one-layer KL", "CLADO"), strict=True
):
    plot_scatter(
        scores[proxy],
        heldout.top1,
        colour=COLOURS[proxy],
        xlabel=proxy,
        ylabel="",
        ax=ax,
    )
axes[0].set_ylabel("top-1 (%)")
plt.show()

# %% [markdown]
# ## The held-out table
#
# Spearman's rho among all configurations (rho@100) and among the 50 and 20 % that a proxy ranks highest, as the paper measures; the 95 %
# interval in brackets is a bootstrap over configurations. *At fixed size*: partial rho given size and BOPs, and the mean rho inside five bins of
# similar size of the stratified sample. A dash stands where it does not exist, because the proxy is a function of size.

# %%
results = load_heldout(chapter.profile).query(
    "variant not in ('evolved', 'transferred', 'as_released')"
)
results = results.sort_values("rho100", ascending=False)
ranks = {
    "rho@20": ("rho20", "lo20", "hi20"),
    "rho@50": ("rho50", "lo50", "hi50"),
    "rho@100": ("rho100", "lo", "hi"),
    "partial rho": ("partial_rho", "partial_lo", "partial_hi"),
}
measured = results.query("variant != 'ceiling'")


def show_estimates(ends):
    """Show every proxy with these estimates and their intervals."""
    show_table(
        measured[["proxy"]].assign(
            **{
                label: with_interval(measured, *names)
                for label, names in ends.items()
            }
        )
    )


show_estimates(ranks)

# %% [markdown]
# The same proxies by rho inside size bins and by three other correlations: Kendall's tau, the share of pairs in the right order less the
# share in the wrong one; weighted tau, in which pairs among the best count most; and Pearson's correlation with $\log(a/(1-a))$, where
# $a$ is the accuracy.

# %%
show_estimates(
    {
        "rho in size bins": ("binned_rho", "binned_lo", "binned_hi"),
        "Kendall": ("kendall", "kendall_lo", "kendall_hi"),
        "weighted tau": ("weighted_tau", "weighted_tau_lo", "weighted_tau_hi"),
        "Pearson, logit": (
            "logit_pearson",
            "logit_pearson_lo",
            "logit_pearson_hi",
        ),
    }
)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "rho on the held-out half with 95 % intervals. Both proxies with pairs of layers lead; those that look at what rounding does to the network follow; most bit-weighted saliencies are no better than counting bits. The bench's own noise ceiling (grey) is far from all of them.", "name": "fig-02-3"}, "image": {"alt": "One row per proxy with its rho as a point and its interval as a line, sorted, and a narrow vertical band for the noise ceiling on the right."}}
figure, ax = plt.subplots(figsize=(6.5, 7.2))
ceiling = results.query("proxy == 'noise ceiling'").iloc[0]
plot_forest(measured, bands={"noise ceiling": (ceiling.lo, ceiling.hi)}, ax=ax)
plt.show()

# %%
row = results.set_index("proxy").loc["bit sum"]
chapter.claim(
    "bit_sum_rho",
    "Bit sum: rho = {:.2f}.",
    row.rho100,
    within={"cifar10-resnet20": (0.5, 0.7)},
    interval=(row.lo, row.hi),
    n=int(row.n),
)

# %% [markdown]
# The best separable proxy is chosen by its fitness on the search half, so that naming it is not a look at the held-out half.

# %% slideshow={"slide_type": "slide"}
pairs = ("CLADO", "added logit changes")
hand_made = results.query("variant == 'corrected' and separable")
best = hand_made.loc[hand_made["search_fitness"].idxmax()]
chapter.claim(
    "best_rho",
    f"Best separable proxy ({best.proxy}): rho = {{:.2f}}.",
    best.rho100,
    within={"cifar10-resnet20": (0.75, 0.9)},
    interval=(best.lo, best.hi),
    n=int(best.n),
    paper="HAWQ-V2 is the best earlier proxy with 0.7475 at n = 50 (quoted by a secondary summary)",
    reported=intervals.sampling_interval(0.7475, 50),
)

# %% slideshow={"slide_type": "-"}
row = results.set_index("proxy").loc["CLADO"]
chapter.claim(
    "pairs_rho",
    "CLADO, with pairs: rho = {:.2f}.",
    row.rho100,
    within={"cifar10-resnet20": (0.9, 0.97)},
    interval=(row.lo, row.hi),
    n=int(row.n),
)

# %% slideshow={"slide_type": "-"}
row = results.set_index("proxy").loc["added logit changes"]
chapter.claim(
    "added_rho",
    "Added logit changes, which cost no more than the one-layer divergence: rho = {:.2f}.",
    row.rho100,
    within={"cifar10-resnet20": (0.87, 0.95)},
    interval=(row.lo, row.hi),
    n=int(row.n),
)

# %% slideshow={"slide_type": "-"}
row = results.set_index("proxy").loc["additive oracle"]
chapter.claim(
    "oracle_rho",
    "Additive oracle: rho = {:.2f}.",
    row.rho100,
    within={"cifar10-resnet20": (0.87, 0.95)},
    interval=(row.lo, row.hi),
    n=int(row.n),
)

# %% [markdown]
# Is the best separable one better than the others, or lucky? Compare it with each on the same resampled configurations, and correct the p-values
# for the number of comparisons. The last column is how many configurations it takes to see the difference four times in five.

# %%
rng = chapter.profile.rng("chapter 02 comparisons")
others = [name for name in scores if name != best.proxy]
against = [
    intervals.compare(scores[best.proxy], scores[name], heldout.top1, rng=rng)
    for name in others
]
compared = pd.DataFrame(
    {
        "proxy": others,
        "difference": [pair.difference for pair in against],
        "lo": [pair.lo for pair in against],
        "hi": [pair.hi for pair in against],
        "p_holm": intervals.holm([pair.p for pair in against]),
        "configurations": [
            min(9_999, np.ceil(pair.configs_to_separate())) for pair in against
        ],
    }
).sort_values("difference")
show_table(
    compared.assign(
        difference=with_interval(compared, "difference", "lo", "hi"),
        configurations=compared["configurations"].astype(int),
    ).drop(columns=["lo", "hi"]),
    decimals=3,
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "significantly_worse",
    f"Of {len(others)} other proxies {{:.0f}} are significantly worse than the best separable one (Holm-corrected p < 0.05).",
    (compared["p_holm"].lt(0.05) & compared["difference"].gt(0)).sum(),
    within={"cifar10-resnet20": (18, 28)},
    n=len(others),
)

# %% [markdown]
# ## All profiles
#
# rho on the held-out half of every study that is published, with its interval. First with weights rounded to nearest:

# %%
studies = [
    name
    for name in profile_names()
    if has_study(chapter.study(name), "heldout.csv")
]
tasks = {
    f"{name}, {quantizer}": found
    for name in studies
    for quantizer in QUANTIZERS
    if len(found := load_heldout(chapter.study(name), quantizer))
}
common = [name for name in measured["proxy"] if "oracle" not in name]
listed = [*common, "additive oracle", "pairwise oracle", "noise ceiling"]
overview = pd.DataFrame(
    {
        task: found.set_index("proxy")["rho100"].reindex(listed)
        for task, found in tasks.items()
    }
)


def show_overview(quantizer):
    """Show rho of every proxy on every network, measured with a quantizer."""
    found = {
        name: tasks[f"{name}, {quantizer}"].set_index("proxy").loc[listed]
        for name in studies
        if f"{name}, {quantizer}" in tasks
    }
    columns = {
        name: with_interval(table, "rho100", "lo", "hi")
        for name, table in found.items()
    }
    show_table(pd.DataFrame({"proxy": listed} | columns))


show_overview("rtn")

# %% [markdown]
# Now the same networks with learned rounding. The scores are the same, because none of them knows how weights will be rounded:

# %%
show_overview("adaround")

# %% slideshow={"slide_type": "slide"}
below = {
    quantizer: sum(
        overview.loc["CLADO", f"{name}, {quantizer}"]
        < overview.loc["bit sum", f"{name}, {quantizer}"]
        for name in studies
        if f"{name}, {quantizer}" in tasks
    )
    for quantizer in QUANTIZERS
}
chapter.claim(
    "below_counting",
    f"With learned rounding CLADO ranks worse than the bit sum on {{:.0f}} of {len(studies)} networks; "
    f"with rounding to nearest on {below['rtn']}.",
    below["adaround"],
    within={"cifar10-resnet20": (1, len(studies))},
    n=len(studies),
)

# %% [markdown] slideshow={"slide_type": "-"}
# The oracles are far above both, so there is something to know. What a layer loses by rounding to nearest is not what it loses when its
# rounding is learned; a proxy for the second must look at the second.

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "rho on the held-out halves of all studies under rounding to nearest, with 95 % intervals; grey bands are noise ceilings. Terms for pairs of layers lead on every network, on MobileNetV2 by little.", "name": "fig-02-4"}, "image": {"alt": "One panel per study, the same proxies as rows in each, with points and intervals; CLADO and added logit changes are near the right end in every panel."}}
plot_forests(
    {name: tasks[f"{name}, rtn"].query("proxy in @common") for name in studies},
    bands={
        name: tuple(
            tasks[f"{name}, rtn"]
            .query("proxy == 'noise ceiling'")[["lo", "hi"]]
            .iloc[0]
        )
        for name in studies
    },
    order=common,
)
plt.show()

# %% [markdown]
# Over studies, proxies are compared by their ranks {cite:p}`demsar`: Friedman's test asks whether all are alike, and two differ if their mean ranks lie
# further apart than Nemenyi's critical difference allows. With few studies that distance is large, and the honest answer is
# that not many pairs are separated. For the methods that the paper compares, its own formula, and the two with pairs:

# %%
judged = [
    "bit sum",
    "parameter bits",
    "BOPs",
    "HAWQ",
    "HAWQ-V2",
    "OMPQ",
    "QE",
    "bit-SNIP",
    "bit-Synflow",
    "EMQ",
    "sqrt one-layer KL",
    *pairs,
]
ranks = overview.loc[judged].T.rank(axis=1, ascending=False)
p_values = scikit_posthocs.posthoc_nemenyi_friedman(ranks)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Critical-difference diagram over studies and quantizers: mean rank of each proxy (1 is best); bars join proxies that Nemenyi's test does not tell apart at 5 %.", "name": "fig-02-5"}, "image": {"alt": "A horizontal axis of mean ranks with labelled ticks for thirteen proxies; horizontal bars join groups that are not significantly different."}}
figure, ax = plt.subplots(figsize=(6.5, 3.4))
scikit_posthocs.critical_difference_diagram(
    ranks.mean(),
    p_values,
    ax=ax,
    label_fmt_left="{label} ({rank:.1f})",
    label_fmt_right="({rank:.1f}) {label}",
    label_props={"fontsize": 8},
    color_palette={name: PLAIN for name in judged},
    crossbar_props={"color": "#808080"},
)
plt.show()

# %% slideshow={"slide_type": "-"}
separated = (p_values.to_numpy()[np.triu_indices(len(judged), 1)] < 0.05).sum()
chapter.claim(
    "separated_pairs",
    f"Over {len(ranks)} tasks Nemenyi's test separates {{:.0f}} of {len(judged) * (len(judged) - 1) // 2} pairs of proxies.",
    separated,
    within=(0, len(judged) ** 2),
    n=len(ranks),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Size is the confounder
#
# More bits mean more accuracy, so anything that grows with bits correlates with accuracy. What does a proxy know beyond that? Budgets
# are met at fixed size; there, a proxy that is size in disguise is worth nothing. Inside bins of the stratified sample:

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "rho inside five bins of similar size (filled, with 95 % intervals) and over all sizes (hollow). Parameter bits, which are size itself, show what size still explains inside a bin; what lies to the right of them knows more than size.", "name": "fig-02-6"}, "image": {"alt": "One row per proxy with a filled dot and an interval for rho inside size bins, and a hollow dot for rho over the held-out random configurations."}}
figure, ax = plt.subplots(figsize=(6.5, 6.4))
binned = measured.dropna(subset="binned_rho")
plot_forest(
    binned.assign(
        rho100=binned["binned_rho"],
        lo=binned["binned_lo"],
        hi=binned["binned_hi"],
    ),
    others=binned.set_index("proxy")["rho100"],
    ax=ax,
)
ax.set_xlabel(
    "Spearman's rho: inside size bins (filled), over all sizes (hollow)"
)
plt.show()

# %% slideshow={"slide_type": "-"}
row = results.set_index("proxy").loc[best.proxy]
chapter.claim(
    "best_partial",
    "At fixed size and BOPs the best separable proxy keeps rho = {:.2f}.",
    row.partial_rho,
    within={"cifar10-resnet20": (0.55, 0.85)},
    interval=(row.partial_lo, row.partial_hi),
    n=int(row.n),
)

# %% slideshow={"slide_type": "-"}
row = results.set_index("proxy").loc["bit sum"]
chapter.claim(
    "bit_sum_partial",
    "Counting bits keeps rho = {:.2f} at fixed size and BOPs.",
    row.partial_rho,
    within={"cifar10-resnet20": (-0.1, 0.2)},
    interval=(row.partial_lo, row.partial_hi),
    n=int(row.n),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Accuracy lost at a budget
#
# A user has a budget and takes the configuration that the proxy ranks first. How much accuracy does that lose against the best measured one
# within the budget? Among the held-out random and stratified configurations:

# %%
_, spread = bench.split("stratified")
pool = pd.concat([heldout.table, spread.table], ignore_index=True)
configs = np.stack(pool["bits"]).astype(np.int8)
size = bench.cost("size")
lost = []
for proxy in judged:
    found = score(tables[proxy]["table"], configs, chapter.profile.choices)
    cells = {"proxy": proxy}
    for average in chapter.profile.budgets:
        budget = np.interp(
            average,
            chapter.profile.choices,
            [size.fixed + column.sum() for column in size.table.T],
        )
        cells[f"{average:g} bits"] = intervals.bootstrap_regret(
            found, pool["top1"], pool["size_bytes"], budget, rng=rng
        )
    lost.append(cells)
lost = pd.DataFrame(lost)
show_table(
    lost.map(
        lambda cell: (
            cell
            if isinstance(cell, str)
            else f"{cell.value:.1f} [{cell.lo:.1f}, {cell.hi:.1f}]"
        )
    )
)

# %% slideshow={"slide_type": "-"}
at_three = lost.set_index("proxy")["3 bits"]
chapter.claim(
    "clado_regret",
    "Within the size of uniform 3 bits CLADO loses {:.1f} points against the best measured configuration.",
    at_three["CLADO"].value,
    within={"cifar10-resnet20": (0, 6)},
    interval=(at_three["CLADO"].lo, at_three["CLADO"].hi),
    n=at_three["CLADO"].n,
)

# %% [markdown]
# ## Seconds against quality
#
# What does a proxy cost? Its statistics on the calibration images and its table, on the machine that the manifest names. Scoring
# configurations then costs nothing.

# %% tags=["hide-output"]
show_table(measured[["proxy", "rho100", "seconds"]])

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "rho on the held-out half against seconds. The relative weight error is nearly free; the one-layer divergence and its pairs cost the same; measuring all pairs costs most and ranks best.", "name": "fig-02-7"}, "image": {"alt": "Scatter of rho against seconds on a logarithmic axis, one labelled point per proxy; CLADO top right, relative weight error high and far left."}}
figure, ax = plt.subplots(figsize=(6.5, 4.4))
plot_quality(
    measured[measured["variant"] == "corrected"],
    labelled=[
        "CLADO",
        "added logit changes",
        "sqrt one-layer KL",
        "relative output error",
        "relative weight error",
        "HAWQ-V2",
        "HAWQ",
        "Fisher error",
        "OMPQ",
        "QE",
        "EMQ",
        "bit-SNIP",
        "bit-Synflow",
    ],
    ax=ax,
)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How many configurations does one need?
#
# The paper evaluates on 50 configurations, and the best 20 % of those are 10. A secondary summary quotes EMQ at 79.21 (all), 57.21 (50 %)
# and 42.59 (20 %). Sampling alone puts these intervals around them:

# %% slideshow={"slide_type": "-"}
for value, n in ((0.7921, 50), (0.5721, 25), (0.4259, 10)):
    low, high = intervals.sampling_interval(value, n)
    print(f"rho = {value:.2f} with n = {n}: {low:.2f} to {high:.2f}")

# %% [markdown]
# The standard error of a difference falls with the root of the number of configurations, so from the comparisons above follows how many show
# a given difference four times in five. At the paper's 50:

# %% slideshow={"slide_type": "-"}
rivals = results.query("variant == 'corrected'").sort_values("rho100")
needed = []
for first, second in itertools.pairwise(rivals["proxy"]):
    pair = intervals.compare(
        scores[second], scores[first], heldout.top1, rng=rng
    )
    needed.append(pair.configs_to_separate())
chapter.claim(
    "neighbours_at_50",
    f"Of {len(needed)} pairs of proxies that follow each other in the table, 50 configurations separate {{:.0f}}.",
    (np.array(needed) <= 50).sum(),
    within=(0, 30),
    n=len(heldout),
)

# %% [markdown]
# Check that by drawing: 50 configurations again and again, and how often the best separable proxy is significantly better than HAWQ-V2.

# %% slideshow={"slide_type": "-"}
draws = [rng.choice(len(heldout), size=50, replace=False) for _ in range(200)]
shown = [
    intervals.compare(
        scores[best.proxy][rows],
        scores["HAWQ-V2"][rows],
        heldout.top1[rows],
        resamples=500,
        rng=rng,
    ).lo
    > 0
    for rows in draws
]
pair = intervals.compare(
    scores[best.proxy], scores["HAWQ-V2"], heldout.top1, rng=rng
)
chapter.claim(
    "power_at_50",
    f"With 50 configurations {{:.0f}} % of the draws show the difference between {best.proxy} and HAWQ-V2; "
    f"{pair.configs_to_separate():.0f} would show it in 80 %.",
    100 * np.mean(shown),
    within={"cifar10-resnet20": (5, 100)},
    n=len(draws),
)

# %% [markdown]
# ## Register your own proxy
#
# Ten lines put a proxy of your own into the plot. It reads the statistics and returns a table, one row per layer and one column per width. As
# an example, the squared error divided by the number of weights:


# %%
@handmade.proxy("my proxy", reads=("errors",))
def mine(statistics: layer_statistics.LayerStatistics) -> np.ndarray:
    """Mean squared error: T[l, b] = -||E_lb||^2 / P_l."""
    return -np.stack(
        [
            e.double().square().mean(dim=(1, 2)).numpy()
            for e in statistics.errors
        ]
    )


my_scores = score(
    handmade.score_table("my proxy", own),
    heldout.configs,
    chapter.profile.choices,
)
my_rho = intervals.bootstrap_rho(my_scores, heldout.top1, rng=rng)
print(my_rho)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "The forest again, with a proxy of one's own in it.", "name": "fig-02-8"}, "image": {"alt": "The forest plot of a few proxies with one more row, my proxy."}}
few_rows = measured[measured["proxy"].isin(judged)][
    ["proxy", "rho100", "lo", "hi"]
]
mine_row = {
    "proxy": "my proxy",
    "rho100": my_rho.value,
    "lo": my_rho.lo,
    "hi": my_rho.hi,
}
figure, ax = plt.subplots(figsize=(6.5, 3.8))
plot_forest(
    pd.concat([few_rows, pd.DataFrame([mine_row])], ignore_index=True), ax=ax
)
plt.show()
del handmade.PROXIES["my proxy"]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What we found
#
# - Counting bits is a strong baseline: {glue:text}`bit_sum_rho:.2f`. A proxy has to be compared with it, not with zero, and most bit-weighted
#   saliencies do not beat it. At fixed size and BOPs it is left with {glue:text}`bit_sum_partial:.2f`.
# - What rounding does to the network's output makes the best separable proxies: {glue:text}`best_rho:.2f`, and at fixed size and BOPs
#   {glue:text}`best_partial:.2f`.
# - Layers interact. With terms for pairs, {glue:text}`pairs_rho:.2f` (CLADO) and {glue:text}`added_rho:.2f` (added logit changes, at the
#   price of the one-layer divergence), as good as an additive model that knows accuracies: {glue:text}`oracle_rho:.2f`. The paper finds
#   existing proxies weak; on this bench the weakness is that they are sums over layers.
# - Fifty configurations separate {glue:text}`neighbours_at_50:.0f` pairs of neighbours in the table.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What could be wrong
#
# - The interval is over configurations, with the checkpoint fixed. Another training run is another draw.
# - Statistics are averages over calibration images. CLADO and the eigenvalues use 128 of them, as the release does, and HAWQ's traces carry a
#   standard error of {glue:text}`trace_error:.0f` %.
# - The saliencies were made to compare architectures, not layers; here they are read layer by layer, which their authors did not claim.
# - The regret looks up measured configurations only. Chapter 04 lets each method choose among all.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Quiz
#
# 1. On the same 50 configurations one proxy has rho 0.6 and another 0.7. Which is better?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Nobody can say from these two numbers. Each has a wide interval at that number of configurations; what decides is the interval of the *difference*, from
# the same resampled configurations.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 2. A proxy that multiplies any positive number per layer by the layer's bits correlates clearly with accuracy. Has it found out which layers are sensitive?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Not necessarily. It grows with bits, and so does accuracy. Compare it with the bit sum, and look at what is left of it at fixed size and BOPs.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 3. Somebody multiplies the Hessian's trace by the bit width instead of the squared rounding error. What does the score still know?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# The curvature of a layer, but not what rounding does to it. From 2 to 3 bits it grows as much as from 3 to 4, although the rounding error falls
# far more in the first step.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 4. You compute thirty proxies on the held-out half and publish the best one's rho there. What is wrong, and what would be right?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# The best of thirty is also the luckiest of thirty, so its rho is too high. Choose on the search half, then look once at the held-out half.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 5. Is the additive oracle's rho an upper bound for every sum over layers?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No, a guide. It is fitted to a limited number of noisy accuracies, by least squares and not for rho, so another sum may rank the held-out half
# better. Proxies with pairs of layers are no sums and are not bound by it at all.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 6. Two layers change the logits in opposite directions. How do a sum over layers and CLADO judge quantizing both?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# The sum adds two losses. CLADO has measured both together and knows that they cancel, at least in part.
# :::

# %% [markdown]
# ## Exercises
#
# 1. *(by hand)* Two layers have $\lVert E_2\rVert^2 = 4, 9$ and $\lVert E_4\rVert^2 = 1, 1$ and mean traces 3 and 1. Which of them should keep 4 bits
#    according to HAWQ-V2?
# 2. *(by hand)* A network gives its two classes the same probability. When quantized, one layer changes the difference of the two logits by 1, another by -1.
#    What do a sum over layers and the added logit changes say of the divergence when both are quantized?
# 3. *(by hand)* A layer computes the logits $Wx$ of two classes, with $W = ((0, 0), (0, 0))$ and $x = (1, 2)$. What is the trace of the Hessian of the
#    cross-entropy with respect to the four weights?
# 4. *(by hand)* Two layers may have 2 or 3 bits, and top-1 is 50, 60, 80, 90 for $(2, 2), (2, 3), (3, 2), (3, 3)$. What is rho of the bit sum, what of
#    $T = ((-4, -1), (-1, 0))$?
# 5. *(from data/)* Which proxies gain, and which lose, when rounding is learned? Sort the overview by the difference.
# 6. *(from data/)* Compute the partial rho of the best separable proxy at fixed size and BOPs with nothing but ranks and least squares.
# 7. *(longer)* With how many configurations does the best separable proxy beat HAWQ-V2 in 95 % of the draws?

# %% [markdown] tags=["solution"]
# :::{dropdown} Solutions
# 1. Going from 4 to 2 bits costs $3 \cdot (4 - 1) = 9$ in the first layer and $1 \cdot (9 - 1) = 8$ in the second: keep the first.
# 2. With equal probabilities $S = \tfrac14((1, -1), (-1, 1))$, so a change $\delta$ of the difference costs $\tfrac12 \cdot \tfrac14 \delta^2$. A sum says
#    $\tfrac18 + \tfrac18 = \tfrac14$. The changes add up to $1 - 1 = 0$, so added logit changes say 0.
# 3. The Hessian is the Kronecker product of $S$ and $xx^\top$, and so is its trace a product: $\tfrac12 \cdot (1 + 4) = 2.5$.
# 4. The bit sums 4, 5, 5, 6 have the ranks 1, 2.5, 2.5, 4, and top-1 has 1, 2, 3, 4: $\rho = 4.5 / \sqrt{4.5 \cdot 5} = \sqrt{0.9}$. A sum that is blind to which
#    layer it is cannot reach 1. The table gives $-5, -4, -2, -1$: $\rho = 1$.
# 5. See the cell below: those that look at what rounding to nearest does lose against counting bits.
# 6. Replace all four columns by their ranks, subtract from score and top-1 what a linear fit of the other two explains, and correlate what is left.
# 7. See the cell below. Draws of half of the held-out half overlap, so its shares are optimistic there.
# :::

# %% tags=["hide-cell", "solution"]
saved = np.array([3, 1]) * (np.array([4, 9]) - np.array([1, 1]))
assert saved.tolist() == [9, 8]

# %% tags=["hide-cell", "solution"]
p = np.array([1 / 2, 1 / 2])
curved = np.diag(p) - np.outer(p, p)
changes = np.array([[0.5, -0.5], [-0.5, 0.5]])  # of the logits, layer by layer
apart = sum(change @ curved @ change / 2 for change in changes)
together = changes.sum(axis=0) @ curved @ changes.sum(axis=0) / 2
assert (apart, together) == (1 / 4, 0)

# %% tags=["hide-cell", "solution"]
x = torch.tensor([1.0, 2.0])
hessian = torch.func.hessian(
    lambda weight: F.cross_entropy(weight @ x, torch.tensor(0))
)(torch.zeros(2, 2))
assert hessian.reshape(4, 4).trace().item() == 2.5

# %% tags=["hide-cell", "solution"]
corners = [[2, 2], [2, 3], [3, 2], [3, 3]]
top1 = np.array([50, 60, 80, 90])
by_table = gather(np.array([[-4, -1], [-1, 0]]), corners, choices=(2, 3))
assert np.isclose(ranking.spearman(np.sum(corners, axis=1), top1), 0.9**0.5)
assert np.isclose(ranking.spearman(by_table, top1), 1)

# %% tags=["hide-cell", "solution"]
gain = overview.filter(like="adaround").mean(axis=1) - overview.filter(
    like="rtn"
).mean(axis=1)
rounding, counting = gain["sqrt one-layer KL"], gain["bit sum"]
assert rounding < counting or not chapter.as_printed
show_table(
    gain.dropna()
    .sort_values()
    .rename("gain")
    .rename_axis("proxy")
    .reset_index()
)

# %% tags=["hide-cell", "solution"]
ranked = (
    heldout.table[["size_bytes", "bops", "top1"]]
    .assign(score=scores[best.proxy])
    .rank()
)
known = np.column_stack([np.ones(len(ranked)), ranked[["size_bytes", "bops"]]])
rest = ranked[["score", "top1"]].to_numpy()
rest = rest - known @ np.linalg.lstsq(known, rest, rcond=None)[0]
partial = np.corrcoef(rest.T)[0, 1]
assert np.isclose(partial, best.partial_rho)
partial

# %% tags=["hide-cell", "solution"]
shares = {}
for n in (30, 50, len(heldout) // 2):
    draws = [
        rng.choice(len(heldout), size=n, replace=False) for _ in range(200)
    ]
    wins = [
        ranking.spearman(scores[best.proxy][rows], heldout.top1[rows])
        > ranking.spearman(scores["HAWQ-V2"][rows], heldout.top1[rows])
        for rows in draws
    ]
    shares[n] = np.mean(wins)
assert max(shares.values()) >= 0.95 or not chapter.as_printed
shares
