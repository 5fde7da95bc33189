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
# # 01 Bench: what each layer's bits do to accuracy
#
# **Question.** If every layer of a network may have its own bit width, how much does the choice matter?
#
# **Answer.** A great deal. In the published study, the random configurations of this chapter reach from
# {glue:text}`spread_min:.1f` to {glue:text}`spread_max:.1f` % top-1, and the float network has
# {glue:text}`float_top1:.1f` %. All of them are real: real weights, real images, every image of the test set.

# %% [markdown]
# | you need | |
# |---|---|
# | earlier chapters | none |
# | files read | `model.safetensors`, `layers.csv`, `bench.parquet`, `checks.csv` of the study; the benches of the other studies |
# | with `REBUILD = True` | trains and measures, too (manifest at the end) |
#
# The bench that the paper {cite:p}`emq2023` was evaluated on, MQ-Bench-101, cannot be had: no commit of the official
# release contains its file. This chapter builds another one, which anybody can open with pandas.

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # study to show
REBUILD: bool = False  # True: compute the study here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from book.making.chapter import start_chapter
from book.making.palette import PLAIN
from book.making.plots import (
    plot_by_bits,
    plot_histogram,
    plot_interactions,
    plot_samples,
    plot_scatter,
)
from book.making.tables import show_source, show_table
from book.studies import bench, checkpoints, checks
from book.studies.bench import load_bench
from book.studies.checkpoints import train_fresh
from book.studies.images import load_dataset
from book.studies.networks import layer_table
from book.studies.study import has_study, manifest_of, read_facts
from emq_lib.bench import engine, sampling
from emq_lib.core import networks, quantizers
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.configs import bits_text, slot_names
from emq_lib.core.costs import gather
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import QUANTIZERS, profile_names
from emq_lib.proxies import intervals, oracles, ranking
from emq_lib.quantization import adaround

chapter = start_chapter("01_bench", PROFILE, REBUILD, SEED)

# %% [markdown]
# With `REBUILD = True` the next cell trains the study's network and measures its bench. Both can be interrupted and
# called again: nothing that was finished is lost or repeated.

# %%
if chapter.rebuild:
    images = load_dataset(chapter.profile)
    checkpoints.build_checkpoint(chapter.profile, images)
    for quantizer in QUANTIZERS:
        bench.build_bench(chapter.profile, images, quantizer=quantizer)
    checks.build_checks(chapter.profile, images)

# %% [markdown]
# ## One layer by hand
#
# Before the real study, a small one that is trained while you read: a residual network of eight layers on
# scikit-learn's handwritten digits, upsampled to 16 x 16 pixels.

# %%
digits = chapter.study("digits-resnet8")
data = load_dataset(digits)
network = train_fresh(digits, data).model
chapter.claim(
    "digits_top1",
    "The digits network classifies {:.1f} % of its test images correctly.",
    top1(predict(network, data.test), data.test.labels),
    within=(95, 100),
    n=len(data.test),
)

# %% [markdown]
# Quantizing comes after *folding*: each batch norm is a scale and a shift per channel, so it is multiplied into the
# convolution before it. The function stays the same, and what is left to store are weights and biases.

# %%
model = fold_batchnorm(network)
weight = model.get_submodule("layer2.0.conv1").weight.detach()
channel = weight[3].flatten()
channel.shape, channel.min().item(), channel.max().item()

# %% [markdown] slideshow={"slide_type": "slide"}
# Two bits are four levels. Spread them evenly over the range of this output channel, and round every weight to the
# nearest level. The *zero point* is the level that stands for exactly zero.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
bits = 2
low, high = min(channel.min(), 0), max(channel.max(), 0)
scale = (high - low) / (2**bits - 1)
zero_point = (-low / scale).round()
codes = ((channel / scale).round() + zero_point).clamp(0, 2**bits - 1)
rounded = (codes - zero_point) * scale
((rounded - channel) ** 2).sum().item()

# %% [markdown] slideshow={"slide_type": "slide"}
# A few large weights set that range, and all the others pay for it with coarse levels. Shrinking the range cuts the
# large ones off and rounds the rest more finely. Which is better is a question to the data, so try every percentage.


# %%
def squared_error(shrink: float) -> float:
    """Error of the channel after rounding on a range shrunk by this factor."""
    scale = shrink * (high - low) / (2**bits - 1)
    zero_point = (-shrink * low / scale).round().clamp(0, 2**bits - 1)
    codes = ((channel / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return (((codes - zero_point) * scale - channel) ** 2).sum().item()


shrinks = [1 - step / 100 for step in range(quantizers.SHRINKS)]
errors = [squared_error(shrink) for shrink in shrinks]

# %% tags=["hide-input"] slideshow={"slide_type": "-"} mystnb={"figure": {"caption": "Squared error of one channel at 2 bits against the range that is kept. The smallest error (vertical line) is not at 100 %: cutting off the largest weights pays.", "name": "fig-01-1"}, "image": {"alt": "Curve of squared error against the share of the range that is kept. It has a minimum below 100 %, marked by a vertical line, and rises on both sides."}}
figure, ax = plt.subplots()
ax.plot(np.multiply(shrinks, 100), errors, color=PLAIN)
ax.axvline(100 * shrinks[int(np.argmin(errors))], color=PLAIN, linestyle="--")
ax.set(
    xlabel="range kept (%)", ylabel="squared error of the channel", yscale="log"
)
plt.show()

# %% [markdown]
# The library does the same for all channels at once. Its source, and the check that both agree:

# %%
show_source(quantizers.choose_qparams)

# %%
library_error = (
    (quantizers.fake_quantize(weight, bits)[3].flatten() - channel)
    .square()
    .sum()
    .item()
)
assert np.isclose(library_error, min(errors), rtol=1e-4)
chapter.claim(
    "range_gain",
    "On this channel the best range has {:.2f} times the error of the full range.",
    library_error / errors[0],
    within=(0, 1),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The weight bank
#
# A layer at $b$ bits has one quantized weight, whatever the other layers do. So quantize each layer once at each
# width: $L \times |B|$ tensors. A configuration is then a *selection* from this bank, and no configuration is ever
# quantized again.

# %%
layers = layer_table(model, digits)
bank = build_weight_bank(model, layers, digits.choices)
show_table(
    layers[
        ["name", "shape", "parameters", "macs", "searchable", "pinned_bits"]
    ],
    decimals=0,
)

# %% [markdown]
# The first and the last layer are *pinned* at 8 bits; the others are searchable, at 2, 3 or 4 bits each. The inputs of
# every layer are rounded to 8 bits, over the range seen on calibration images, which are training images.

# %%
ranges = quantizers.choose_activation_ranges(
    model, layers, data.calibration, bits=digits.activation_bits
)
quantized = networks.QuantizedNetwork(model, bank, ranges)
config = (4, 4, 2, 3, 4, 2)
accuracy = top1(predict(quantized.select(config), data.test), data.test.labels)
accuracy

# %% [markdown]
# Measuring many configurations shares work: neighbours in lexicographic order agree on their first layers, so the
# network is cut into pieces and each piece runs again only if something before it changed.

# %%
configs = sampling.sample_configs(
    len(bank.searchable), digits.choices, 40, rng=digits.rng("chapter 01")
)
measured = [
    item
    for block in engine.measure(quantized, data.test, configs)
    for item in block
]
plain = {
    item.config: predict(quantized.select(item.config), data.test)
    for item in measured[:5]
}
assert all(
    np.array_equal(
        item.correct,
        (plain[item.config].argmax(dim=1) == data.test.labels).numpy(),
    )
    for item in measured[:5]
)

# %% [markdown]
# The assertion compares sharing with the plain forward pass image by image. On these digits the spread is:

# %%
live = np.array([item.top1 for item in measured])
chapter.claim(
    "digits_spread",
    "The configurations of the digits span {:.0f} points of top-1.",
    np.ptp(live),
    within=(20, 100),
    n=len(live),
)

# %% [markdown]
# ## The published bench
#
# From here on the chapter shows the study named by `PROFILE`. Its checkpoint carries its own facts: the epoch was
# chosen on validation images, and the test images were looked at once.
#
# The schedule is a short one, made for processors without a GPU. For the network of `cifar10-resnet20` its
# authors report 8.75 % error {cite:p}`resnet` after several times as many epochs, so the float network here is somewhat below what
# the architecture can reach.

# %%
card = read_facts(chapter.profile, "model.safetensors")
chapter.claim(
    "float_top1",
    "The float network has {:.2f} % top-1.",
    card["top1"],
    within={"cifar10-resnet20": (90, 91.25), "digits-resnet8": (95, 100)},
)

# %%
chapter.claim(
    "epochs",
    "It was trained for {:.0f} epochs.",
    chapter.profile.training.epochs,
    within=(1, 100),
)

# %%
measured = load_bench(chapter.profile)
sample, uniform = measured.select("random"), measured.select("uniform")
show_table(
    measured.table.head(6)
    .assign(bits=lambda table: table["bits"].map(bits_text))
    .drop(columns=["key", "config_id", "quantizer", "n_a", "n_b"])
)

# %% [markdown]
# One row is one configuration on all test images: top-1, cross-entropy, the correct answers in two fixed halves of the
# images, packed size and bit operations (BOPs). How are they spread?

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Top-1 of the random configurations, with the uniform ones and the float network marked. Bits decide between useless and nearly lossless.", "name": "fig-01-2"}, "image": {"alt": "Histogram of top-1 over random configurations, wide and skewed, with vertical lines for uniform 2, 3 and 4 bits and for the float network."}}
figure, ax = plt.subplots()
marks = {
    f"all {row.bits[0]}": row.top1 for row in uniform.table.itertuples()
} | {"float": card["top1"]}
plot_histogram(sample.top1, marks, xlabel="top-1 on all test images (%)", ax=ax)
plt.show()

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "spread_min",
    "The worst random configuration has {:.1f} % top-1.",
    sample.top1.min(),
    within={"cifar10-resnet20": (10, 40)},
    n=len(sample),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "spread_max",
    "The best random configuration has {:.1f} % top-1.",
    sample.top1.max(),
    within={"cifar10-resnet20": (85, 91)},
    n=len(sample),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "spread_sd",
    "The standard deviation of top-1 over random configurations is {:.1f} points.",
    sample.top1.std(ddof=1),
    within={"cifar10-resnet20": (10, 20)},
    n=len(sample),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The noise floor
#
# A bench is only as good as it agrees with itself. Rank all configurations by their accuracy on half A of the test
# images and on half B: the Spearman correlation of the two rankings says how much of an order is luck of the images.

# %% slideshow={"slide_type": "-"}
ceiling = intervals.noise_ceiling(
    sample.half_a, sample.half_b, rng=chapter.profile.rng("noise ceiling")
)
chapter.claim(
    "noise_ceiling",
    "The two halves rank the configurations with rho = {:.3f}.",
    ceiling.halves.value,
    within={"cifar10-resnet20": (0.99, 1)},
    interval=(ceiling.halves.lo, ceiling.halves.hi),
    n=len(sample),
)

# %% [markdown]
# From that follows a ceiling: the true accuracies themselves, measured without any noise, would not correlate perfectly with
# these measurements on a finite number of images. No proxy can be seen to rank better than that.

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "perfect_proxy",
    "A perfect proxy would reach rho = {:.4f}.",
    ceiling.perfect.value,
    within={"cifar10-resnet20": (0.999, 1)},
    interval=(ceiling.perfect.lo, ceiling.perfect.hi),
    n=len(sample),
)

# %% [markdown]
# The images are one source of luck; the calibration images, which set the ranges of the layers' inputs, are another. So
# some of the configurations were measured again with other draws of calibration images, disjoint from the bench's own.

# %%
again = checks.load_checks(chapter.profile)
by_draw = {
    quantizer: again[again["quantizer"] == quantizer].pivot(
        index="bits", columns="draw", values="top1"
    )
    for quantizer in QUANTIZERS
}
draw_sd = {
    quantizer: np.sqrt(table.var(axis=1, ddof=1).mean())
    for quantizer, table in by_draw.items()
}
chapter.claim(
    "draw_sd",
    f"Between {len(by_draw['rtn'].columns)} draws the top-1 of a configuration has a standard deviation of {{:.2f}} points.",
    draw_sd["rtn"],
    within={"cifar10-resnet20": (0, 1)},
    n=len(by_draw["rtn"]),
)

# %%
draw_rho = {
    quantizer: intervals.bootstrap_rho(
        table[0].to_numpy(),
        table[1].to_numpy(),
        rng=chapter.profile.rng("draws"),
    )
    for quantizer, table in by_draw.items()
}
chapter.claim(
    "draw_rho",
    "Two draws rank the configurations with rho = {:.3f}.",
    draw_rho["rtn"].value,
    within={"cifar10-resnet20": (0.97, 1)},
    interval=(draw_rho["rtn"].lo, draw_rho["rtn"].hi),
    n=draw_rho["rtn"].n,
)

# %% [markdown]
# ## What makes a configuration bad
#
# Average the accuracy of all configurations in which a layer has 2 bits, then 3, then 4. The gap between the curves is
# what the layer's bits are worth, the others being random.

# %%
chosen = np.stack([sample.configs == b for b in chapter.profile.choices])


def mean_by_bits(rows: np.ndarray) -> np.ndarray:
    """Return the mean top-1 of these configurations by bits and slot, shape (B, S)."""
    picked = chosen[:, rows]
    return (picked * sample.top1[rows, None]).sum(axis=1) / picked.sum(axis=1)


everything = np.arange(len(sample))
effects = pd.DataFrame(
    mean_by_bits(everything).T,
    index=slot_names(bench.load_layers(chapter.profile)),
    columns=chapter.profile.choices,
)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Mean top-1 by the bits of each layer, layers in forward order. Going from 2 to 3 bits buys nearly all of the accuracy, and layers differ widely in how much; 3 and 4 bits differ by less than the noise of a sample of this size.", "name": "fig-01-3"}, "image": {"alt": "Three lines of mean top-1 against the layer, one for 2, 3 and 4 bits. The line for 2 bits lies lowest at nearly every layer, at some of them far lower."}}
figure, ax = plt.subplots()
plot_by_bits(effects, ax=ax)
plt.show()

# %%
gain = (effects[3] - effects[2]).sort_values(ascending=False)
show_table(gain.head(3).rename("points gained from 2 to 3 bits").reset_index())

# %% [markdown]
# Averaged over layers, with intervals from a bootstrap over configurations:

# %% slideshow={"slide_type": "-"}
rng = chapter.profile.rng("gains by bits")
resampled = [rng.choice(everything, size=len(everything)) for _ in range(1_000)]
draws = [np.diff(mean_by_bits(rows), axis=0).mean(axis=1) for rows in resampled]
low, high = np.quantile(draws, [0.025, 0.975], axis=0)
gains = np.diff(mean_by_bits(everything), axis=0).mean(axis=1)
chapter.claim(
    "gain_two_to_three",
    "Going from 2 to 3 bits in one layer gains {:.1f} points of top-1.",
    gains[0],
    within={"cifar10-resnet20": (3, 8)},
    interval=(low[0], high[0]),
    n=len(sample),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "gain_three_to_four",
    "Going from 3 to 4 bits in one layer gains {:.1f} points of top-1.",
    gains[1],
    within={"cifar10-resnet20": (-2, 2)},
    interval=(low[1], high[1]),
    n=len(sample),
)

# %% [markdown]
# ## Where configurations sit
#
# Is it then only a matter of spending bits? And does the bench have configurations where budgets are met? Random ones
# crowd around the mean size, because the bits of many layers average out. So the bench holds a second sample,
# *stratified*: the range of sizes is cut into strips of equal width, and each strip gives one configuration, drawn
# uniformly from those in it. A third one, *one-off*, changes a single layer of the uniform configuration in the middle.

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Top-1 against packed size. Random configurations form a cloud around the mean size; the stratified ones reach the edges, where budgets are met. At any one size accuracies spread over tens of points: size alone does not decide.", "name": "fig-01-4"}, "image": {"alt": "Scatter of top-1 against packed size: a cloud of random configurations in the middle, stratified ones from edge to edge, one-off ones near the uniform 3-bit configuration, uniform ones joined by a line."}}
figure, ax = plt.subplots()
plot_samples(
    {name: rows for name, rows in measured.table.groupby("sample")}, ax=ax
)
plt.show()

# %%
low, high = uniform.table["size_bytes"].min(), uniform.table["size_bytes"].max()
edge = (low, low + (high - low) / 4)
stratified = measured.select("stratified")
shares = {
    name: len(some.within(size=edge)) / len(some)
    for name, some in (("random", sample), ("stratified", stratified))
}
chapter.claim(
    "edge_random",
    "Of the random configurations {:.1f} % lie in the smallest quarter of the range of sizes.",
    100 * shares["random"],
    within={"cifar10-resnet20": (0, 10)},
    n=len(sample),
)

# %%
chapter.claim(
    "edge_stratified",
    "Of the stratified ones {:.1f} % do.",
    100 * shares["stratified"],
    within={"cifar10-resnet20": (20, 30)},
    n=len(stratified),
)

# %% slideshow={"slide_type": "-"}
middle = (
    sample.table["size_bytes"].rank(pct=True).between(0.45, 0.55).to_numpy()
)
chapter.claim(
    "spread_at_size",
    "Among the tenth of the configurations of middle size, top-1 still spans {:.0f} points.",
    np.ptp(sample.top1[middle]),
    within={"cifar10-resnet20": (30, 80)},
    n=int(middle.sum()),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Adding up
#
# Almost every proxy is a sum over layers. How far can a sum go? Fit the best one there is: ridge regression from the
# bits of each layer to measured accuracy, on one half of the random configurations (and of the images), and
# let it rank the other half. It has seen accuracies, which no proxy has. This is the *additive oracle*.

# %% slideshow={"slide_type": "-"}
search, heldout = measured.split()
rng = chapter.profile.rng("oracles")
fit = search.configs, search.half_a
additive = oracles.additive_oracle(
    *fit, heldout.configs, chapter.profile.choices
)
estimate = intervals.bootstrap_rho(additive.predictions, heldout.top1, rng=rng)
chapter.claim(
    "additive_oracle",
    "The additive oracle ranks the held-out half with rho = {:.2f}.",
    estimate.value,
    within={"cifar10-resnet20": (0.85, 0.97)},
    interval=(estimate.lo, estimate.hi),
    n=estimate.n,
)

# %% [markdown] slideshow={"slide_type": "-"}
# What is missing is *interaction*: two layers at 2 bits may lose more, or less, than the sum of what each loses alone.
# Give the regression the products of all pairs of layers as well.

# %% slideshow={"slide_type": "-"}
pairwise = oracles.pairwise_oracle(
    *fit, heldout.configs, chapter.profile.choices
)
change = intervals.compare(
    pairwise.predictions, additive.predictions, heldout.top1, rng=rng
)
chapter.claim(
    "pairwise_gain",
    "Products of pairs change rho by {:+.3f}.",
    change.difference,
    within={"cifar10-resnet20": (0, 0.05)},
    interval=(change.lo, change.hi),
    n=change.n,
)

# %% [markdown]
# The same question without a fit that has to be believed: pair by pair, how much more do two layers lose at the lowest width
# than the sum says? The $p$-values allow for unequal variances; Holm's method allows for the number of pairs.

# %% slideshow={"slide_type": "slide"}
interactions, p_values = oracles.pair_interactions(
    sample.configs, sample.top1, chapter.profile.choices
)
pairs = np.triu_indices(len(interactions), 1)
adjusted = intervals.holm(p_values[pairs])
clear = adjusted < 0.05
chapter.claim(
    "pairs_clear",
    f"{{:.0f}} of {len(clear)} pairs of layers interact beyond chance.",
    clear.sum(),
    within={"cifar10-resnet20": (1, 40)},
    n=len(sample),
)

# %% tags=["hide-input"] slideshow={"slide_type": "-"} mystnb={"figure": {"caption": "What two layers lose together at the lowest width, beyond the sum of what each loses alone (points of top-1; red: they lose more together, blue: less). Dots mark the pairs that are clear after Holm's correction.", "name": "fig-01-5"}, "image": {"alt": "Square heat map with layers on both axes, red where two layers lose more together than the sum of each, blue where less, with dots on the clear pairs."}}
figure, ax = plt.subplots(figsize=(6, 5.2))
marks = np.zeros(interactions.shape, dtype=bool)
marks[pairs] = clear
plot_interactions(interactions, marks | marks.T, names=effects.index, ax=ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Rounding that looks at outputs
#
# Rounding to nearest changes each weight least. AdaRound {cite:p}`adaround` changes each layer's *output* least: weight by weight it
# learns whether to round down or up. A layer is linear in its weight, so the mean squared change of its output is a
# quadratic form in the rounding errors, and the second moments of the layer's inputs on the calibration images are all it needs.

# %%
show_source(adaround.adaround)

# %% [markdown] slideshow={"slide_type": "-"}
# The inputs are those of the float network. So a layer at $b$ bits still has one weight, whatever the other layers do, and the bank
# stays a bank: $L \times |B|$ reconstructions serve every configuration. The published bench holds the same configurations
# under both quantizers.

# %% slideshow={"slide_type": "-"}
rounded = load_bench(chapter.profile, quantizer="adaround")
learned = rounded.select("random")
assert (learned.configs == sample.configs).all()
lift = stats.ttest_1samp(learned.top1 - sample.top1, 0)
low, high = lift.confidence_interval()
chapter.claim(
    "lift",
    "Learned rounding changes the top-1 of random configurations by {:+.1f} points on average.",
    (learned.top1 - sample.top1).mean(),
    within={"cifar10-resnet20": (20, 35)},
    interval=(low, high),
    n=len(learned),
)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Top-1 of the random configurations under both quantizers. Learned rounding lifts the bad ones most: what spans most of the range on the horizontal axis spans a few points on the vertical one.", "name": "fig-01-6"}, "image": {"alt": "Scatter of top-1 under learned rounding against top-1 under rounding to nearest: a flat band near the top that rises slowly to the right."}}
figure, ax = plt.subplots()
plot_scatter(
    sample.top1,
    learned.top1,
    colour=PLAIN,
    xlabel="top-1, rounding to nearest (%)",
    ylabel="top-1, learned rounding (%)",
    ax=ax,
)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# With so little left between configurations, is there still an order to be found? What was asked of the first bench, asked of both.
# Where the spread drowns in the noise of few test images, the bench has one more sample, in which layers may have 1 bit too.

# %%
compared = {"rtn": sample, "adaround": learned}
if "one-bit" in set(rounded.table["sample"]):
    compared["adaround, 1 bit too"] = rounded.select("one-bit")
ceilings = {
    name: intervals.noise_ceiling(
        some.half_a, some.half_b, rng=chapter.profile.rng("noise ceiling")
    )
    for name, some in compared.items()
}
rows = [
    {
        "random configurations under": name,
        "n": len(some),
        "mean top-1": some.top1.mean(),
        "standard deviation": some.top1.std(ddof=1),
        "halves agree (rho)": ceilings[name].halves.value,
        "perfect proxy (rho)": ceilings[name].perfect.value,
        "between draws (points)": draw_sd.get(name),
        "draws agree (rho)": draw_rho[name].value if name in draw_rho else None,
    }
    for name, some in compared.items()
]
table = pd.DataFrame(rows).set_index("random configurations under")
show_table(table.T.rename_axis(index=table.index.name).reset_index())

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "adaround_sd",
    "With learned rounding the standard deviation over random configurations is {:.2f} points.",
    learned.top1.std(ddof=1),
    within={"cifar10-resnet20": (0.5, 3)},
    n=len(learned),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "adaround_ceiling",
    "There a perfect proxy would reach rho = {:.3f}.",
    ceilings["adaround"].perfect.value,
    within={"cifar10-resnet20": (0.95, 1)},
    interval=(
        ceilings["adaround"].perfect.lo,
        ceilings["adaround"].perfect.hi,
    ),
    n=len(learned),
)

# %% slideshow={"slide_type": "-"}
agreement = intervals.bootstrap_rho(
    sample.top1, learned.top1, rng=chapter.profile.rng("quantizers")
)
chapter.claim(
    "quantizers_rho",
    "The two quantizers rank the configurations alike with rho = {:.2f}.",
    agreement.value,
    within={"cifar10-resnet20": (0.7, 0.9)},
    interval=(agreement.lo, agreement.hi),
    n=agreement.n,
)

# %% slideshow={"slide_type": "-"}
search, heldout = rounded.split()
oracle = oracles.additive_oracle(
    search.configs, search.half_a, heldout.configs, chapter.profile.choices
)
estimate = intervals.bootstrap_rho(
    oracle.predictions, heldout.top1, rng=chapter.profile.rng("oracles")
)
chapter.claim(
    "adaround_oracle",
    "Under learned rounding the additive oracle ranks the held-out half with rho = {:.2f}.",
    estimate.value,
    within={"cifar10-resnet20": (0.85, 0.97)},
    interval=(estimate.lo, estimate.hi),
    n=estimate.n,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ### Layer by layer, or in order?
#
# The bank reconstructs each layer for itself. BRECQ {cite:p}`brecq` reconstructs whole blocks, one after another, each on the inputs that
# the quantized blocks before it give, so that later blocks can repair what earlier ones did. That costs a run of its own for
# every configuration. It was done for a few, with BRECQ's order and a plain squared error, to see whether the
# bank's shortcut misleads.

# %% slideshow={"slide_type": "-"}
rows = again[again["quantizer"] == "in order"]
in_order = rows.set_index("bits")["top1"]
from_bank = by_draw["adaround"][0].loc[in_order.index]
rho = ranking.spearman(from_bank.to_numpy(), in_order.to_numpy())
chapter.claim(
    "order_rho",
    "Bank and reconstruction in order rank these configurations alike with rho = {:.2f}.",
    rho,
    within={"cifar10-resnet20": (0, 0.6)},
    interval=intervals.sampling_interval(rho, len(in_order)),
    n=len(in_order),
)

# %% slideshow={"slide_type": "-"}
difference = stats.ttest_1samp(in_order - from_bank, 0)
low, high = difference.confidence_interval()
chapter.claim(
    "order_gain",
    "Reconstruction in order changes top-1 by {:+.2f} points against the bank.",
    (in_order - from_bank).mean(),
    within={"cifar10-resnet20": (1, 4)},
    interval=(low, high),
    n=len(in_order),
)

# %% [markdown]
# Why do they hardly agree? Because there is hardly anything left to agree on:

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "order_sd",
    "After reconstruction in order the standard deviation over these configurations is {:.2f} points.",
    in_order.std(ddof=1),
    within={"cifar10-resnet20": (0, 0.5)},
    n=len(in_order),
)

# %%
rho = ranking.spearman(rows["correct_a"], rows["correct_b"])
chapter.claim(
    "order_halves",
    "The two halves of the test images rank them alike with rho = {:.2f}.",
    rho,
    within={"cifar10-resnet20": (0, 0.8)},
    interval=intervals.sampling_interval(rho, len(rows)),
    n=len(rows),
)

# %% [markdown]
# So this check neither confirms nor refutes the bank's order. It says something else: reconstruct well enough, and at these widths
# it hardly matters which layer gets which.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Other networks
#
# Does what one network says about bits hold in another? Take the additive oracle's table of one study, stretch it to the
# depth of another by linear interpolation (slot $s$ of $S$ stands at $(s + \tfrac12)/S$), and let it rank the other's held-out
# half. On the diagonal is a network's own oracle; the first row is what counting bits does, told nothing at all.

# %% slideshow={"slide_type": "-"}
studies = [
    load_bench(profile)
    for profile in map(chapter.study, profile_names())
    if has_study(profile, "bench.parquet")
    and profile.choices == chapter.profile.choices
]
halves = [study.split() for study in studies]
tables = {"bit sum": np.array([chapter.profile.choices])}
for study, (search, heldout) in zip(studies, halves, strict=True):
    tables[study.name] = oracles.additive_oracle(
        search.configs, search.half_a, heldout.configs, study.choices
    ).table
transfer = {}
for target, (_, heldout) in zip(studies, halves, strict=True):
    slots, choices = heldout.configs.shape[1], target.choices
    transfer[target.name] = {
        source: intervals.bootstrap_rho(
            gather(
                oracles.resample_layers(table, slots), heldout.configs, choices
            ),
            heldout.top1,
            rng=chapter.study(target.name).rng("transfer"),
        )
        for source, table in tables.items()
    }
shown = pd.DataFrame(transfer).map(
    lambda rho: f"{rho.value:.2f} [{rho.lo:.2f}, {rho.hi:.2f}]"
)
shown.loc["n"] = [len(heldout) for _, heldout in halves]
show_table(shown.rename_axis("fitted on").reset_index())

# %% slideshow={"slide_type": "-"}
here = transfer[chapter.profile.name]
others = [
    rho
    for source, rho in here.items()
    if source not in ("bit sum", chapter.profile.name)
]
best = max(others, key=lambda rho: rho.value, default=None)
best and chapter.claim(
    "transfer_rho",
    f"Of {len(others)} other networks' tables the best ranks this network's held-out half with rho = {{:.2f}}.",
    best.value,
    within={"cifar10-resnet20": (0.3, 0.75)},
    interval=(best.lo, best.hi),
    n=best.n,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What we found
#
# - Bits chosen at random spread top-1 over {glue:text}`spread_sd:.1f` points of standard deviation: the bench separates
#   good from bad configurations well.
# - Its own noise is negligible: rho between two halves of the images is {glue:text}`noise_ceiling:.3f`.
# - The loss comes from layers at 2 bits: a third bit is worth {glue:text}`gain_two_to_three:.1f` points, a fourth
#   {glue:text}`gain_three_to_four:.1f` ({glue:text}`gain_three_to_four_lo:.1f` to {glue:text}`gain_three_to_four_hi:.1f`).
# - At one size configurations still differ by {glue:text}`spread_at_size:.0f` points. This is the room that a good
#   choice of bits can win.
# - A sum over layers, told the accuracies of half of the configurations, ranks the other half with rho
#   {glue:text}`additive_oracle:.2f`; products of pairs change that by {glue:text}`pairwise_gain:+.3f`
#   ({glue:text}`pairwise_gain_lo:+.3f` to {glue:text}`pairwise_gain_hi:+.3f`). Layers interact, but most of what bits do adds up.
# - Learned rounding lifts a configuration by {glue:text}`lift:.1f` points on average and leaves {glue:text}`adaround_sd:.1f` points of
#   standard deviation. An order is still there to be found (a perfect proxy would reach {glue:text}`adaround_ceiling:.3f`, the
#   additive oracle {glue:text}`adaround_oracle:.2f`), but it is another order: rho between the two quantizers is
#   {glue:text}`quantizers_rho:.2f`. A proxy that was judged under rounding to nearest has not been judged under learned rounding.
# - Reconstruction in order, which no bank can give, changes top-1 by another {glue:text}`order_gain:+.1f` points
#   ({glue:text}`order_gain_lo:+.1f` to {glue:text}`order_gain_hi:+.1f`) and leaves {glue:text}`order_sd:.2f` points of standard deviation: at 2
#   to 4 bits there is then little to choose.
# - What accuracies say about one network's layers is hardly better than counting bits when it is carried over to another network by
#   depth. Sensitivity belongs to the network.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What could be wrong
#
# - One network, trained once, on one data set. The section on other networks carries tables over by depth alone; a carriage that knows
#   more of the layers (stage, kind, number of weights) may do better.
# - Learned rounding is judged with settings that fit a laptop, and reconstruction in order on twenty configurations. Twenty that
#   differ by less than the images' luck cannot tell whether the bank's order is the order of better quantizers.
# - The next two chapters judge proxies on the random sample, which crowds around the mean size. Budgets are met at the edges.

# %% [markdown]
# How each file of this study was made:

# %%
manifest = (
    pd.DataFrame(manifest_of(chapter.profile))
    .T.rename_axis("file")
    .reset_index()
)
show_table(
    manifest[
        ["file", "rows", "command", "commit", "device", "seconds", "note"]
    ],
    decimals=1,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Quiz
#
# 1. Two bits are four levels, so a range that leaves out a weight cannot represent it. Must a good range then cover all weights of its
#    channel?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No. The range sets the distance of the levels, so a few large weights make all others coarse. The range with the least squared error
# cuts some weights off and rounds the rest more finely.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 2. A network with $L$ searchable layers and $B$ widths has $B^L$ configurations. How many tensors have to be quantized to measure any of
#    them, and what would break this?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# $L \cdot B$: a layer's weight at $b$ bits does not depend on the other layers. It would break if it did, as in reconstruction in order,
# where a block is fitted to what the quantized blocks before it give.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 3. The two halves of the test images rank the configurations almost alike. Does that make a measured top-1 the network's true accuracy?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No. It says that the *order* is not luck of the images. Each accuracy still has the error of a share of so many images, and the
# checkpoint, the data set and the calibration images are one draw each.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 4. Averaged over random configurations a fourth bit gains next to nothing. May one then drop the width 4 from the choices?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No. In a random configuration some other layer has 2 bits and decides. Where no layer is that low, which is where a generous budget leads,
# the last points come from fourth bits. An average over random configurations speaks of random configurations.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 5. Two layers at 2 bits lose 5 points each when alone, and 14 together. Which models of accuracy cannot say so, however well they are fitted?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# All sums over layers. They give both layers together the sum of what each loses alone; the 4 points beyond that are an interaction.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 6. A proxy ranks a bench well that was measured with rounding to nearest. What is known about it under learned rounding?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Little. The two quantizers rank the same configurations differently, because what a layer loses by rounding to nearest is not what it
# loses when its rounding is learned.
# :::

# %% [markdown]
# ## Exercises
#
# Three levels: *by hand* is paper and pencil; *from data/* is a few lines on the tables of a study; *longer* needs a loop or a fit.
#
# 1. *(by hand)* A channel holds the weights 0, 1, 2, 3 and 8. Round them to 2 bits on the full range, then on the range
#    0 to 3. Which has the smaller squared error, and which weight pays for it?
# 2. *(by hand)* Round the weight $((0, 1), (12, 30))$ to 2 bits, first with one range for all four numbers, then with one for each row. What
#    are the squared errors, and what does the better one cost in bytes?
# 3. *(by hand)* A channel holds $-1, -0.2, 0.6$ and $2$. What are its scale and zero point at 2 bits on the full range, what the four
#    codes, and what the squared error?
# 4. *(by hand)* Two layers may have 2 or 3 bits. Top-1 is 50 for $(2, 2)$, 70 for $(2, 3)$, 80 for $(3, 2)$ and 90 for $(3, 3)$. How large
#    is the interaction, and how far off is the best sum over layers?
# 5. *(from data/)* Of the random configurations that are smaller than the uniform 3-bit one, how many have a higher top-1?
# 6. *(from data/)* Take each random configuration's top-1 on half A less that on half B. What standard deviation would independent images
#    give, which one do you find, and why?
# 7. *(longer)* Fit top-1 on the search half by the sum of the bits alone, then by one term per layer and width. How large
#    are the errors on the held-out half, in points?

# %% [markdown] tags=["solution"]
# :::{dropdown} Solutions
# 1. The full range has levels 0, 8/3, 16/3, 8: squared error $1^2 + (2/3)^2 + (1/3)^2 = 14/9$ (0 and 8 are exact; 1 rounds to 0,
#    2 and 3 to 8/3). The range 0 to 3 is exact but for the 8, which is cut off to 3: squared error 25. Here the full
#    range is better; with many more small weights it would not be.
# 2. One range has the levels 0, 10, 20, 30: 1 goes to 0 and 12 to 10, squared error $1 + 4 = 5$. A range of its own makes the first row
#    exact and leaves the second as it was: 4. It costs one more scale and zero point, five bytes.
# 3. The range from -1 to 2 has three steps, so the scale is 1 and the zero point 1. Codes 0, 1, 2, 3 stand for -1, 0, 1, 2: squared error
#    $0.2^2 + 0.4^2 = 0.2$.
# 4. $50 + 90 - 70 - 80 = -10$: together the two layers lose 10 points more than the sum of what each loses alone. The best sum spreads
#    that over the four configurations and is 2.5 points off at each.
# 5. See the cell below. Bits that are thrown at random hardly ever beat an even hand.
# 6. Less than independent images would give. All configurations see the *same* images: if half A is the easier one, it is easier for
#    nearly all of them, and that part of the luck does not touch their order.
# 7. See the cell below. The sum of the bits does not know that layers differ.
# :::


# %% tags=["hide-cell", "solution"]
def on_range(values: np.ndarray, high: float) -> np.ndarray:
    """Return the values on the nearest of four levels from 0 to high."""
    levels = np.linspace(0, high, 4)
    return levels[np.abs(values[..., None] - levels).argmin(axis=-1)]


example = np.array([0, 1, 2, 3, 8])
full, cut = (
    ((on_range(example, high) - example) ** 2).sum() for high in (8, 3)
)
assert np.isclose(full, 14 / 9)
assert cut == 25

# %% tags=["hide-cell", "solution"]
matrix = np.array([[0, 1], [12, 30]])
by_row = np.stack([on_range(row, row.max()) for row in matrix])
assert ((on_range(matrix, matrix.max()) - matrix) ** 2).sum() == 5
assert ((by_row - matrix) ** 2).sum() == 4

# %% tags=["hide-cell", "solution"]
by_hand = weight.new_tensor([[-1, -0.2, 0.6, 2]])
scale, zero_point = quantizers.choose_qparams(by_hand, bits=2, shrinks=1)
codes = (by_hand / scale).round() + zero_point
assert (scale.item(), zero_point.item()) == (1, 1)
assert codes.tolist() == [[0, 1, 2, 3]]
assert np.isclose(((codes - 1) - by_hand).square().sum().item(), 0.2)

# %% tags=["hide-cell", "solution"]
corners = np.array([[50, 70], [80, 90]])  # rows: bits of the first layer
best_sum = np.add.outer(corners.mean(axis=1), corners.mean(axis=0))
left = corners - (best_sum - corners.mean())
assert corners[0, 0] + corners[1, 1] - corners[0, 1] - corners[1, 0] == -10
assert np.allclose(left, [[-2.5, 2.5], [2.5, -2.5]])

# %% tags=["hide-cell", "solution"]
three = uniform.table.iloc[1]
smaller = sample.table.query("size_bytes < @three.size_bytes")
better = (smaller["top1"] > three.top1).sum()
assert better < len(smaller) / 4 or not chapter.as_printed
better, len(smaller)

# %% tags=["hide-cell", "solution"]
halves = (
    sample.table["correct_a"] / sample.table["n_a"],
    sample.table["correct_b"] / sample.table["n_b"],
)
found = 100 * (halves[0] - halves[1]).std()
share = sample.top1 / 100
images = 1 / sample.table["n_a"] + 1 / sample.table["n_b"]
independent = 100 * np.sqrt((share * (1 - share) * images).mean())
assert found < independent or not chapter.as_printed
found, independent

# %% tags=["hide-cell", "solution"]
search, heldout = measured.split()
line = np.polyfit(search.configs.sum(axis=1), search.top1, 1)
predictions = {
    "sum of the bits": np.polyval(line, heldout.configs.sum(axis=1)),
    "a term per layer and width": oracles.additive_oracle(
        search.configs, search.top1, heldout.configs, chapter.profile.choices
    ).predictions,
}
errors = {
    name: np.sqrt(np.mean((one - heldout.top1) ** 2))
    for name, one in predictions.items()
}
term, total = errors["a term per layer and width"], errors["sum of the bits"]
assert term < total or not chapter.as_printed
errors
