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
# # 04 Allocation: from scores to bits under a budget
#
# **Question.** Given a score table and a budget, which configuration is best, and how good is it really?
#
# **Answer.** The first half is an exact computation of milliseconds. The second is not: at
# {glue:text}`tight_bits:.2f` bits on average the configurations that the methods choose lie between
# {glue:text}`tight_worst:.1f` and {glue:text}`tight_best:.1f` % top-1. A higher rank correlation buys accuracy only
# loosely: over many formulas and proxies the two correlate with {glue:text}`rho_predicts:.2f`
# ({glue:text}`rho_predicts_lo:.2f` to {glue:text}`rho_predicts_hi:.2f`). Among the best fifth of configurations, where allocations lie, it is {glue:text}`top_predicts:.2f`.

# %% [markdown]
# | you need | |
# |---|---|
# | earlier chapters | 02 and 03 |
# | files read | `layers.csv`, `bench.parquet`, `proxies.json`, `statistics.safetensors`, `evolution.jsonl` of the study; `heldout.csv`, `searches.csv` and `quantization.csv` of all |
# | with `REBUILD = True` | measures every choice, too (manifest in chapter 01) |

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # study to show
REBUILD: bool = False  # True: compute the study here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import itertools
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display

from book.making.chapter import start_chapter
from book.making.plots import (
    plot_forest,
    plot_front,
    plot_heatmap,
    plot_scatter,
)
from book.making.tables import show_source, show_table, with_interval
from book.studies import allocation, bench, evolution
from book.studies.bench import load_bench
from book.studies.heldout import load_heldout, load_searched, load_tables
from book.studies.images import load_dataset
from book.studies.means import difference_of_means, mean_with_interval
from book.studies.methods import (
    FOR_RHO,
    INSIDE,
    REFINED,
    RISING,
    RISING_INSIDE,
)
from book.studies.proxies import load_proxies
from book.studies.study import has_study
from emq_lib.allocation import approximate, exact
from emq_lib.core.configs import slot_names
from emq_lib.core.costs import CostTable, average_bits_cost, gather
from emq_lib.core.errors import InfeasibleBudgetError
from emq_lib.core.profiles import profile_names
from emq_lib.proxies.intervals import sampling_interval
from emq_lib.proxies.scores import score

chapter = start_chapter("04_allocation", PROFILE, REBUILD, SEED)

# %%
METHODS = [  # sums over layers, by which bits can be allocated exactly
    "bit sum",
    "parameter bits",
    "BOPs",
    "bit-SNIP",
    "bit-Synflow",
    "HAWQ-V2",
    "Fisher error",
    "relative weight error",
    "relative output error",
    "one-layer loss",
    "one-layer KL",
    "sqrt one-layer KL",
    "evolved",
    "evolved for rho",
    "evolved for allocation",
    "additive oracle",
]
known = load_tables(chapter.profile)
tables = {name: known[name] for name in METHODS}
if chapter.rebuild:  # every proxy, and the formula of every search
    allocation.build_quantization(
        chapter.profile,
        load_dataset(chapter.profile),
        known | load_searched(chapter.profile),
    )

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Size and BOPs by hand
#
# Packed at $b$ bits, a layer of $P$ weights takes $\lceil P b / 8 \rceil$ bytes. Each output channel adds a scale of four bytes and
# a zero point of one, each bias four bytes. Sum this over the layers of a configuration and compare with the bench.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
measured = load_bench(chapter.profile)
layers = bench.load_layers(chapter.profile)
config = measured.configs[5]
widths = np.where(
    layers["searchable"], config[layers["slot"]], layers["pinned_bits"]
)
weights = np.ceil(layers["parameters"] * widths / 8)
by_hand = (weights + 5 * layers["channels"] + 4 * layers["biases"]).sum()
assert by_hand == measured.query(config)["size_bytes"]
by_hand

# %% [markdown]
# BOPs multiply every multiply-accumulate by both widths, the weight's and the activation's.

# %%
bops = (layers["macs"] * widths * chapter.profile.activation_bits).sum()
assert bops == measured.query(config)["bops"]
bops / 1e9

# %% [markdown]
# Both are tables like the scores: a fixed part for the pinned layers plus one entry per layer and width. What a
# configuration costs is one gather.

# %%
size, choices = measured.cost("size"), chapter.profile.choices
show_source(CostTable, gather)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Three layers by brute force
#
# The problem: pick one entry per row of the score table, make their sum as large as possible, and keep the sum of the same entries of the
# cost table within the budget. It is a knapsack in which every layer contributes exactly one item. With three layers one can
# try all 27 answers.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
scores = load_proxies(chapter.profile)[1]["sqrt one-layer KL"]["table"]
small = CostTable("size", "bytes", 0.0, size.table[:3])
everything = np.array(list(itertools.product(choices, repeat=3)))
fits = small.total(everything, choices) <= small.total([[3, 3, 3]], choices)[0]
best = everything[fits][gather(scores[:3], everything[fits], choices).argmax()]
best

# %% [markdown] slideshow={"slide_type": "slide"}
# The library states it as an integer program and hands it to HiGHS, which proves that nothing better exists. It agrees:

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
budget = {"size": small.total([[3, 3, 3]], choices)[0]}
solved = exact.allocate(scores[:3], {"size": small}, budget, choices)
assert np.isclose(solved.score, gather(scores[:3], [best], choices)[0])
solved

# %% [markdown]
# ## The whole network
#
# A budget of 2.5 bits on average means: the packed size halfway between uniform 2 and uniform 3. Every row of the picture is the
# configuration that one method chooses for it.

# %%
middle = exact.budget_for_average_bits(2.5, size, choices)
chosen = {
    name: exact.allocate(
        entry["table"],
        {"size": size},
        {"size": middle},
        choices,
        time_limit=20.0,
    )
    for name, entry in tables.items()
}
assert all(one.costs["size"] <= middle for one in chosen.values())
unproven = [name for name, one in chosen.items() if not one.optimal]
print("without a proof after 20 seconds:", ", ".join(unproven) or "none")

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Bits per layer at 2.5 bits on average, one row per method. All but one save on the large late layers, where a bit costs most, and disagree about the layers in the middle. To parameter bits a bit is worth exactly what it costs, so it has no preference and starves the small early layers.", "name": "fig-04-1"}, "image": {"alt": "Grid of bit widths, one row per method and one column per layer, darker for fewer bits."}}
figure, ax = plt.subplots(figsize=(6.5, 4.2))
plot_heatmap(
    pd.DataFrame(
        {name: one.bits for name, one in chosen.items()},
        index=slot_names(layers),
    ).T,
    ax=ax,
)
plt.show()

# %%
searchable = average_bits_cost(layers, choices)
averages = searchable.total([one.bits for one in chosen.values()], choices)
chapter.claim(
    "budget_used",
    "The choices use {:.3f} bits on average or more of the 2.5 allowed.",
    averages.min(),
    within=(2.3, 2.51),
    n=len(chosen),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Other ways to allocate
#
# Published code solves this problem in other ways. HAWQ-V3 {cite:p}`hawqv3` states the same integer program. *Greedy* raises one layer at a time by score gained per byte. OMPQ {cite:p}`ompq` lets widths be fractions, and *rounds*. The
# released code of EMQ draws 50,000 *mutants* of a root, which is OMPQ's answer, and keeps the best. How often does each miss the optimum, by how much of the way from the
# worst configuration to the best, and how long does it take?

# %%
budgets = np.linspace(size.smallest, size.fixed + size.table[:, -1].sum(), 14)
budgets = budgets[1:-1]
rng = chapter.profile.rng("mutants")
costs = {"size": size}


def mutants(budget):
    """Return the best mutant of the rounded answer."""
    root = approximate.allocate_rounded(scores, costs, budget, choices)
    return approximate.allocate_by_mutation(
        lambda configs: gather(scores, configs, choices),
        root.bits,
        costs,
        budget,
        choices,
        rng=rng,
    )


ways = {
    "exact": lambda b: exact.allocate(scores, costs, b, choices),
    "greedy": lambda b: exact.allocate_greedy(scores, costs, b, choices),
    "relaxed, rounded": lambda b: approximate.allocate_rounded(
        scores, costs, b, choices
    ),
    "mutants of a root": mutants,
}

# %% slideshow={"slide_type": "-"}
found, seconds = {}, {}
for name, way in ways.items():
    started = time.perf_counter()
    found[name] = np.array([way({"size": b}).score for b in budgets])
    seconds[name] = (time.perf_counter() - started) / len(budgets)
height = scores.max(axis=1).sum() - scores.min(axis=1).sum()
lost = {name: (found["exact"] - one) / height for name, one in found.items()}
show_table(
    pd.DataFrame(
        [
            {
                "way": name,
                "misses (%)": 100 * (one > 1e-9).mean(),
                "mean loss (%)": 100 * one.mean(),
                "largest loss (%)": 100 * one.max(),
                "milliseconds": 1_000 * seconds[name],
            }
            for name, one in lost.items()
        ]
    ),
    decimals=3,
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "greedy_misses",
    "Greedy misses the optimum at {:.0f} % of the budgets.",
    100 * (lost["greedy"] > 1e-9).mean(),
    within={"cifar10-resnet20": (10, 100)},
    n=len(budgets),
)

# %% [markdown]
# *Parameter-greedy* needs no proxy: the next bit goes to the layer with the fewest weights that can take one. That is greedy on the bit sum, and there greedy is exact, for all bits are worth
# the same and the cheapest come first. So the rows named bit sum, here and in chapter 05, are also those of parameter-greedy, up to ties.

# %%
bit_sum = tables["bit sum"]["table"]
exactly, by_weights = (
    np.array([way(bit_sum, costs, {"size": b}, choices).score for b in budgets])
    for way in (exact.allocate, exact.allocate_greedy)
)
chapter.claim(
    "parameter_greedy",
    "Parameter-greedy reaches the largest bit sum that fits at {:.0f} % of the budgets.",
    100 * np.isclose(exactly, by_weights).mean(),
    within={"cifar10-resnet20": (100, 100)},
    n=len(budgets),
)

# %% [markdown]
# The relaxed program also prices the budget: how much score one more KiB would be worth. Where the price falls, bits stop paying.

# %%
prices = [
    exact.shadow_prices(scores, costs, {"size": b}, choices)["size"]
    for b in budgets
]
pd.Series(
    np.array(prices) * 2**10, index=(budgets / 2**10).round(1), name="per KiB"
).round(4)

# %% [markdown]
# ## A budget that cannot be met
#
# When nothing fits, the answer is not an empty list but the smallest value that can be reached.

# %%
try:
    exact.allocate(
        scores, {"size": size}, {"size": 0.9 * size.smallest}, choices
    )
except InfeasibleBudgetError as error:
    print(error)

# %% [markdown]
# ## The front, measured
#
# Allocating at a range of budgets gives each method's front. These configurations were then quantized and run on all test images, which
# is the only comparison that counts.

# %%
results = allocation.load_quantization(chapter.profile)
front = results[
    results["proxy"].isin([*allocation.FRONT_METHODS, "uniform"])
].assign(KiB=results["size_bytes"] / 2**10)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Measured top-1 against packed size: each method's allocations, the uniform configurations, and the bench's random configurations as grey points. A good allocation beats uniform bits at the same size; counting bits does not.", "name": "fig-04-2"}, "image": {"alt": "Lines of measured top-1 against packed size, one per method, over a grey cloud of random configurations."}}
figure, ax = plt.subplots()
random = measured.select("random").table
plot_scatter(
    random["size_bytes"] / 2**10,
    random["top1"],
    colour="#c4c4c4",
    xlabel="",
    ylabel="",
    ax=ax,
)
plot_front(front, x="KiB", ax=ax)
ax.set(xlabel="packed size (KiB)")
plt.show()

# %%
budgeted = results[
    results["average_bits"].isin(chapter.profile.budgets)
    & results["proxy"].isin([*METHODS, "uniform", "random"])
]
wide = budgeted.groupby(["proxy", "average_bits"])["top1"].mean().unstack()

# %% [markdown] slideshow={"slide_type": "slide"}
# Chapter 05 has the whole table. How far apart are the methods at the tightest budget?

# %% slideshow={"slide_type": "-"}
tight = chapter.profile.budgets[0]
methods = wide.drop(index=["random", "uniform"], errors="ignore")[tight]
chapter.claim(
    "tight_bits",
    "The tightest budget is {:.2f} bits on average.",
    tight,
    within=(2, 2.5),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "tight_worst",
    "At the tightest budget the worst method's choice has {:.1f} % top-1.",
    methods.min(),
    within={"cifar10-resnet20": (30, 60)},
    n=len(methods),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "tight_best",
    "At the tightest budget the best method's choice has {:.1f} % top-1.",
    methods.max(),
    within={"cifar10-resnet20": (70, 90)},
    n=len(methods),
)

# %% [markdown]
# At the size of uniform 3 bits the comparison with uniform bits is direct. The intervals are those that the number of test images
# allows; since all configurations see the same images, they are on the wide side. Once for the hand-made proxy that is best on the search half, once for
# the one evolved for allocation:

# %% slideshow={"slide_type": "-"}
ranks = load_heldout(chapter.profile).set_index("proxy")
hand_made = ranks.query("variant == 'corrected' and proxy in @METHODS")[
    "search_fitness"
].idxmax()
images = int(results["n_a"].iloc[0] + results["n_b"].iloc[0])


def gain_over_uniform(name: str) -> tuple[float, tuple[float, float]]:
    """Return a method's gain over uniform 3 bits in points, with its 95 % interval."""
    shares = wide.loc[[name, "uniform"], 3.0] / 100
    gain = shares[name] - shares["uniform"]
    margin = 1.96 * np.sqrt((shares * (1 - shares)).sum() / images)
    return 100 * gain, (100 * (gain - margin), 100 * (gain + margin))


gain, interval = gain_over_uniform(hand_made)
chapter.claim(
    "hand_gain",
    f"The choice of {hand_made} gains {{:.1f}} points over uniform 3 bits.",
    gain,
    within={"cifar10-resnet20": (1, 4)},
    interval=interval,
    n=images,
)

# %% slideshow={"slide_type": "-"}
gain, interval = gain_over_uniform("evolved for allocation")
chapter.claim(
    "evolved_gain",
    "The choice of the proxy evolved for allocation is {:+.1f} points from uniform 3 bits.",
    gain,
    within={"cifar10-resnet20": (0, 3)},
    interval=interval,
    n=images,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A score that falls
#
# The proxy that evolved for rho ranks random configurations better than any hand-made sum over layers, and yet with more bits to spend its choices hardly improve. Its
# table says why: in some layers a width scores below a smaller one, so bits stay unspent. Among random configurations such an error costs little rho, because other
# layers decide; an optimizer goes looking for it.

# %%
falls = {
    name: 100 * (np.diff(known[name]["table"], axis=1) < 0).mean()
    for name in (*(name for name in METHODS if "evolved" in name), hand_made)
}
pd.Series(falls).round(0)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "falling_steps",
    "In the table of evolved for rho {:.0f} % of the steps to one more bit score lower than before.",
    falls["evolved for rho"],
    within={"cifar10-resnet20": (5, 60)},
)

# %% slideshow={"slide_type": "-"}
widest = chapter.profile.budgets[-1]
shares = wide.loc[["evolved for rho", hand_made], widest] / 100
lost = 100 * (shares["evolved for rho"] - shares[hand_made])
margin = 196 * np.sqrt((shares * (1 - shares)).sum() / images)
chapter.claim(
    "evolved_at_widest",
    f"At {widest:g} bits evolved for rho buys {{:+.1f}} points against {hand_made}.",
    lost,
    within={"cifar10-resnet20": (-8, -1)},
    interval=(lost - margin, lost + margin),
    n=images,
)

# %% [markdown] slideshow={"slide_type": "-"}
# The remedy is a rule for the search: a formula whose table falls with more bits in any layer is turned away, like one that is not finite. *Evolved for allocation* kept
# this rule, and its fitness was the correlation inside sizes, among configurations that compete for one budget.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which fitness buys accuracy?
#
# Five searches of chapter 03 differ in nothing but what they maximized: rho, its mean at 20, 50 and 100 % (the paper's), or rho inside sizes; two under the rule. Each ended in one formula per seed, every formula allocated bits at every
# budget, and every configuration was measured. Half A of the test images had a say in the fitness, so accuracies here are those on half B.

# %%
FITNESS = {
    REFINED: "the paper's",
    FOR_RHO: "rho",
    INSIDE: "rho inside sizes",
    RISING: "rho, rising",
    RISING_INSIDE: "rho inside sizes, rising",
}


def bought(profile):
    """Return half B's accuracy of what formulas and hand-made proxies chose, a column per budget."""
    found = allocation.load_search_choices(profile)
    found["fitness"] = found["method"].map(FITNESS)
    by_seed = found.pivot(
        index=["fitness", "seed"], columns="average_bits", values="half_b"
    )
    others = allocation.load_quantization(profile).query(
        "average_bits in @profile.budgets"
    )
    return by_seed, others.pivot_table(
        index="proxy", columns="average_bits", values="half_b"
    )


by_seed, by_proxy = bought(chapter.profile)

# %%
columns = {}
for average in by_seed:
    means = mean_with_interval(by_seed[average].groupby("fitness"))
    columns[f"{average:g} bits"] = with_interval(
        means, "mean", "lo", "hi", decimals=1
    )
table = pd.DataFrame(columns, index=means.index)
table.loc[f"hand-made: {hand_made}"] = [
    f"{value:.1f}" for value in by_proxy.loc[hand_made]
]
show_table(table.reset_index())

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Half B's top-1 of the allocated configurations, mean over budgets, by what the search maximized: dots are means over seeds with 95 % intervals. The vertical line is the hand-made proxy that is best on the search half. To rank better is not to allocate better: the fitness of all sizes together buys least, and no search buys more than the best hand-made proxy.", "name": "fig-04-fitness"}, "image": {"alt": "One row per fitness with the mean accuracy bought over budgets and its interval over seeds; a vertical line marks the best hand-made proxy."}}
figure, ax = plt.subplots(figsize=(6.5, 2.6))
means = mean_with_interval(by_seed.mean(axis=1).groupby("fitness"))
reference = by_proxy.loc[hand_made].mean()
plot_forest(
    means.rename(columns={"mean": "rho100"}).rename_axis("proxy").reset_index(),
    ax=ax,
)
ax.axvline(reference, color="#808080", linewidth=1)
ax.annotate(
    hand_made,
    (reference, -0.9),
    xytext=(4, 0),
    textcoords="offset points",
    va="center",
)
ax.set_xlabel("top-1 on half B, mean over budgets (%)")
plt.show()

# %% slideshow={"slide_type": "slide"}
over_budgets = by_seed.mean(axis=1)
gap, interval, n = difference_of_means(
    over_budgets["rho, rising"], over_budgets["rho"]
)
chapter.claim(
    "rising_gain",
    "With rho as fitness, the rule against falling scores changes the accuracy bought by {:+.1f} points, mean over budgets.",
    gap,
    within={"cifar10-resnet20": (-20, 20)},
    interval=interval,
    n=n,
)

# %% slideshow={"slide_type": "-"}
gap, interval, n = difference_of_means(
    over_budgets["rho inside sizes, rising"], over_budgets["rho, rising"]
)
chapter.claim(
    "inside_gain",
    "Under that rule, rho inside sizes instead of rho changes it by {:+.1f} points.",
    gap,
    within={"cifar10-resnet20": (-20, 20)},
    interval=interval,
    n=n,
)

# %% slideshow={"slide_type": "-"}
gains = mean_with_interval((over_budgets - reference).groupby("fitness"))
one = gains.loc["rho inside sizes, rising"]
chapter.claim(
    "allocation_gain",
    f"Formulas of that last search buy {{:+.1f}} points against {hand_made}, mean over budgets.",
    one["mean"],
    within={"cifar10-resnet20": (-20, 20)},
    interval=(one["lo"], one["hi"]),
    n=int(one["n"]),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Scores with pairs of layers
#
# CLADO and the proxies that evolved with pairs are no sums over layers, so they cannot be allocated by a knapsack. A *local search* takes the best of a random pool that uses the budget up, and changes one or two
# layers at a time while that helps. Nothing proves its answer. On the digits all configurations can be tried, and there it finds the best one:

# %%
digits = chapter.study("digits-resnet8")
matrix = load_proxies(digits)[1]["CLADO"]["table"]
small = load_bench(digits).cost("size")
limit = exact.budget_for_average_bits(2.5, small, digits.choices)


def by_pairs(configs):
    """Return CLADO's scores."""
    return score(matrix, configs, digits.choices)


local = approximate.allocate_locally(
    by_pairs,
    {"size": small},
    {"size": limit},
    digits.choices,
    rng=digits.rng("local search"),
)
everything = np.array(list(itertools.product(digits.choices, repeat=6)))
fits = small.total(everything, digits.choices) <= limit
assert np.isclose(local.score, by_pairs(everything[fits]).max())
local

# %% [markdown]
# What do they buy? Half B's accuracy of their choices, beside the best hand-made sum over layers:

# %%
with_pairs = [name for name, entry in known.items() if not entry["separable"]]
with_pairs = [name for name in with_pairs if name in by_proxy.index]
table = by_proxy.loc[[*with_pairs, hand_made]].assign(
    mean=lambda t: t.mean(axis=1)
)
show_table(table.sort_values("mean", ascending=False).reset_index(), decimals=1)

# %% slideshow={"slide_type": "-"}
best_pair = load_heldout(chapter.profile).set_index("proxy")
best_pair = best_pair.loc[with_pairs, "search_fitness"].idxmax()
shares = by_proxy.loc[[best_pair, hand_made]] / 100
gap = 100 * (shares.loc[best_pair] - shares.loc[hand_made]).mean()
seen = int(results["n_b"].iloc[0])
margin = 196 * np.sqrt((shares * (1 - shares)).to_numpy().sum() / seen)
margin /= shares.shape[1]  # of a mean over budgets
chapter.claim(
    "pairs_buy",
    f"The choices of {best_pair} buy {{:+.1f}} points against {hand_made}, mean over budgets.",
    gap,
    within={"cifar10-resnet20": (-10, 10)},
    interval=(gap - margin, gap + margin),
    n=seen,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which correlation predicts the accuracy bought?
#
# Now forget where formulas come from: take those of all five searches and every hand-made sum over layers, and ask which of their correlations on held-out configurations goes with the
# accuracy that they buy.

# %%
MEASURES = {
    "heldout_rho20": "rho at 20 %",
    "heldout_rho50": "rho at 50 %",
    "heldout_rho100": "rho",
    "heldout_binned": "rho inside sizes",
}
IN_TABLE = ["rho20", "rho50", "rho100", "binned_rho"]


def measured_and_bought(profile):
    """Return correlations and accuracies, one row per formula or hand-made proxy."""
    by_seed, by_proxy = bought(profile)
    searches = evolution.load_searches(profile)
    searches["fitness"] = searches["method"].map(FITNESS)
    searches = searches.dropna(subset="fitness").set_index(["fitness", "seed"])
    table = load_heldout(profile).set_index("proxy")
    table = table.query("separable and variant in ('trivial', 'corrected')")
    hand = table[IN_TABLE].set_axis(list(MEASURES.values()), axis=1)
    evolved = searches[list(MEASURES)].rename(columns=MEASURES)
    measures = pd.concat([hand, evolved.set_axis(list(evolved.index))])
    accuracy = pd.concat([by_proxy, by_seed.set_axis(list(by_seed.index))])
    return measures, accuracy.loc[measures.index]


# %%
def correlations(profile):
    """Return each measure's correlation with the accuracy at each budget and with its mean."""
    measures, accuracy = measured_and_bought(profile)
    accuracy["all budgets"] = accuracy.mean(axis=1)
    return pd.DataFrame(
        {
            column: measures.corrwith(accuracy[column], method="spearman")
            for column in accuracy
        }
    ), len(measures)


def as_text(rho, n):
    """Return a correlation with the interval that n allows; a dash where all choices are alike."""
    if np.isnan(rho):
        return "–"
    return "{:.2f} [{:.2f}, {:.2f}]".format(rho, *sampling_interval(rho, n))


agreement, n = correlations(chapter.profile)
texts = agreement.map(lambda rho: as_text(rho, n))
show_table(texts.rename_axis(f"n = {n}").reset_index())

# %% slideshow={"slide_type": "-"}
for key, measure in (
    ("top_predicts", "rho at 20 %"),
    ("rho_predicts", "rho"),
    ("inside_predicts", "rho inside sizes"),
):
    value = agreement.loc[measure, "all budgets"]
    display(
        chapter.claim(
            key,
            f"Over formulas and proxies, {measure} and the accuracy bought, mean over budgets, correlate with {{:.2f}}.",
            value,
            within={"cifar10-resnet20": (-0.5, 1)},
            interval=sampling_interval(value, n),
            n=n,
        )
    )

# %% [markdown]
# An allocation looks for the top of a ranking, so what counts is the order there. (Formulas of one search resemble each other, so these intervals are too narrow.)
#
# ## Other networks
#
# The same on every network whose choices were measured: half B's accuracy, mean over budgets, by fitness; and how each correlation goes with it.

# %%
studies = {
    name: chapter.study(name)
    for name in profile_names()
    if has_study(chapter.study(name), "quantization.csv", "searches.csv")
}


def accuracies(profile):
    """Return texts: half B's accuracy, mean over budgets, by fitness and by rivals."""
    by_seed, by_proxy = bought(profile)
    means = mean_with_interval(by_seed.mean(axis=1).groupby("fitness"))
    texts = with_interval(means, "mean", "lo", "hi", decimals=1)
    table = load_heldout(profile).set_index("proxy")
    hand = table.query("variant == 'corrected' and proxy in @METHODS")
    rivals = {
        "best hand-made": hand["search_fitness"].idxmax(),
        "bit sum": "bit sum",
        "additive oracle": "additive oracle",
    }
    others = by_proxy.mean(axis=1)
    return pd.Series(texts, means.index).to_dict() | {
        label: f"{others[name]:.1f}" for label, name in rivals.items()
    }


table = pd.DataFrame({name: accuracies(one) for name, one in studies.items()})
show_table(table.rename_axis("fitness").reset_index())

# %%
predictions = {}
for name, profile in studies.items():
    values, n = correlations(profile)
    predictions[f"{name} (n = {n})"] = [
        as_text(rho, n) for rho in values["all budgets"]
    ]
# %%
table = pd.DataFrame(predictions, index=list(MEASURES.values()))
show_table(table.rename_axis("correlation").reset_index())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What we found
#
# - Exact allocation takes milliseconds, so there is no reason to guess.
# - At {glue:text}`tight_bits:.2f` bits the choices spread from {glue:text}`tight_worst:.1f` to {glue:text}`tight_best:.1f` %.
# - At the size of uniform 3 bits, the best hand-made proxy's choice gains {glue:text}`hand_gain:.1f` points over uniform bits. The evolved
#   proxy's gains {glue:text}`evolved_gain:.1f` ({glue:text}`evolved_gain_lo:+.1f` to {glue:text}`evolved_gain_hi:+.1f`).
# - A higher rho does not buy accuracy by itself. The proxy that evolved for rho ranks random configurations better than any hand-made sum over layers, and at the widest budget its
#   choice is {glue:text}`evolved_at_widest:+.1f` points from that of the best hand-made one, because its scores fall where an optimizer looks.
# - A rule against falling scores mends that: {glue:text}`rising_gain:+.1f` points ({glue:text}`rising_gain_lo:+.1f` to {glue:text}`rising_gain_hi:+.1f`) over all budgets, though it costs rho
#   (chapter 03). Fitness inside sizes adds {glue:text}`inside_gain:+.1f` ({glue:text}`inside_gain_lo:+.1f` to {glue:text}`inside_gain_hi:+.1f`).
# - Even so the formulas of that search are {glue:text}`allocation_gain:+.1f` points ({glue:text}`allocation_gain_lo:+.1f` to {glue:text}`allocation_gain_hi:+.1f`) from the best hand-made proxy.
#   Evolution found better rankings, not better allocations.
# - Scores with pairs of layers, allocated by local search, buy {glue:text}`pairs_buy:+.1f` points ({glue:text}`pairs_buy_lo:+.1f` to {glue:text}`pairs_buy_hi:+.1f`) against that proxy, though they
#   rank far better.
# - Of all correlations the one among the best 20 % goes with the accuracy bought most closely, {glue:text}`top_predicts:.2f` against {glue:text}`rho_predicts:.2f` for all configurations. On the
#   other networks, where all choices are closer together, no measure stands out.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What could be wrong
#
# - One seed of the checkpoint: another network may order the methods otherwise. Chapter 05
#   gives the interval that the test images alone allow.
# - All methods, the additive oracle included, assume that the losses of layers add up. At tight budgets they do not.
# - An optimum of a score is only as good as the score where it is optimal, which is a corner that random configurations never visit.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Quiz
#
# 1. The solver proves that its configuration is optimal. Is it then the most accurate one within the budget?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# It is the one with the highest *score* within the budget. The proof is about the score table; how good the score is there only a measurement can tell.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 2. What happens to the chosen configuration if 5 is added to all entries of one layer's row? If the whole table is doubled? If one row is doubled?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Nothing in the first two cases: all configurations gain the same, or all differences double. Doubling one row changes what that layer's bits are worth against those of the others, and so the choice.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 3. A budget of 2.5 bits on average: do as many layers get 2 bits as get 3?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No. The average is over weights, and layers differ much in size. One large layer at 2 bits can pay for many small ones at 4.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 4. In one layer a score table falls from 3 to 4 bits. Why does that hurt an allocation more than a rank correlation?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Over random configurations the error is one small term among many. An optimizer takes the best entry of every row that it can pay for, so it finds each such error and leaves the bits unspent.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 5. Proxy X has the higher rho on random configurations. Why may Y's choices still be better at a tight budget?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Random configurations crowd around the mean size. A tight budget lies at the edge, and its optimum at the top of the ranking, where few of them are and layers interact more.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 6. Greedy comes close to the optimum here. What is an exact solver good for?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# It takes the solver out of the comparison: whatever is wrong with a choice is then the score's fault. And it takes no longer than guessing.
# :::

# %% [markdown]
# ## Exercises
#
# 1. *(by hand)* Two layers of 100 and 10 weights, bits 2 or 3, scores $T = ((-4, -1), (-3, -1))$. Which configuration is best within
#    250 bits of weights? Within 330?
# 2. *(by hand)* A layer has 10 weights in 2 output channels, and 2 biases. How many bytes does it take at 3 bits, and what share of them are weights?
# 3. *(by hand)* A second bit in layer one gains 3 points of score for 10 bytes, in layer two 4 points for 20 bytes; the budget allows 20 bytes more. What do greedy, an exact solver and the relaxed
#    program reach, and what is a byte worth?
# 4. *(from data/)* Add BOPs as a second budget, at the BOPs of uniform 3 bits. Does the choice at 3 bits change?
# 5. *(from data/)* At 2.5 bits, does any measured configuration within the budget have a higher score than the allocated one? A higher top-1?
# 6. *(longer)* Draw random tables of three layers and three widths. How often is greedy not optimal?

# %% [markdown] tags=["solution"]
# :::{dropdown} Solutions
# 1. All-2 costs 220 bits and scores -7. Raising the small layer costs 10 more: -5, within 250. Within 330 both can be raised: 330 bits, score -2.
# 2. $\lceil 30 / 8 \rceil = 4$ bytes of weights, $2 \cdot 5$ of scales and zero points, $2 \cdot 4$ of biases: 22 bytes, of which weights are 2/11. Only in large layers do bits decide the size.
# 3. Greedy takes layer one, which gains most per byte, and cannot pay for layer two: 3. Exact is layer two alone: 4. The relaxed program takes layer one and half of layer two: $3 + 2 = 5$. One more byte
#    buys a twentieth of layer two: 0.2.
# 4. See the cell below: both choices, one after the other.
# 5. See the cell below. The score cannot be beaten, since the solver proved it; for accuracy one has to count.
# 6. See the cell below: in a good part of the draws.
# :::

# %% tags=["hide-cell", "solution"]
worth_of = np.array([[-4.0, -1.0], [-3.0, -1.0]])
weight_bits = {
    "weights": CostTable(
        "weights", "bits", 0.0, np.array([[200.0, 300.0], [20.0, 30.0]])
    )
}
for allowed, answer, total in ((250, (2, 3), -5), (330, (3, 3), -2)):
    one = exact.allocate(worth_of, weight_bits, {"weights": allowed}, (2, 3))
    assert (one.bits, one.score) == (answer, total)

# %% tags=["hide-cell", "solution"]
from emq_lib.core.costs import size_cost

layer = {"parameters": 10, "channels": 2, "biases": 2, "searchable": True}
tiny = pd.DataFrame([layer | {"slot": 0, "pinned_bits": 0}])
assert size_cost(tiny, (3,)).total([[3]], (3,)) == 22

# %% tags=["hide-cell", "solution"]
gains = np.array([[0.0, 3.0], [0.0, 4.0]])
prices = {
    "size": CostTable("size", "bytes", 0.0, np.array([[0.0, 10], [0.0, 20]]))
}
problem = gains, prices, {"size": 20.0}, (1, 2)
assert exact.allocate_greedy(*problem).score == 3
assert exact.allocate(*problem).score == 4
assert np.isclose(exact.shadow_prices(*problem)["size"], 0.2)

# %% tags=["hide-cell", "solution"]
both = {"size": size, "BOPs": measured.cost("BOPs")}
limits = {
    name: cost.total([[3] * len(scores)], choices)[0]
    for name, cost in both.items()
}
one = exact.allocate(scores, {"size": size}, {"size": limits["size"]}, choices)
two = exact.allocate(scores, both, limits, choices)
assert two.score <= one.score
assert two.costs["BOPs"] <= limits["BOPs"]
one.bits, two.bits

# %% tags=["hide-cell", "solution"]
name = "sqrt one-layer KL"
inside = measured.table[measured.table["size_bytes"] <= middle]
rivals = gather(scores, np.stack(inside["bits"]), choices)
assert rivals.max() <= chosen[name].score + 1e-9
bought_top1 = results.query("proxy == @name and average_bits == 2.5")["top1"]
(inside["top1"] > bought_top1.mean()).sum(), len(inside)

# %% tags=["hide-cell", "solution"]
rng = np.random.default_rng(0)
everything = np.array(list(itertools.product(choices, repeat=3)))
missed = []
for _ in range(200):
    table, cost = np.sort(rng.random((2, 3, 3)), axis=2)
    prices = {"size": CostTable("size", "bytes", 0.0, cost)}
    limit = (cost[:, 0].sum() + cost[:, -1].sum()) / 2
    fits = prices["size"].total(everything, choices) <= limit
    optimum = gather(table, everything[fits], choices).max()
    greedy = exact.allocate_greedy(
        table, prices, {"size": limit}, choices
    ).score
    assert greedy <= optimum + 1e-9
    missed.append(greedy < optimum - 1e-9)
assert any(missed)
np.mean(missed)
