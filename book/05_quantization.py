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
# # 05 Quantization: what is left, and what is on disk
#
# **Question.** Which configuration would one ship at a given size, and is the file as small as claimed?
#
# **Answer.** Rounded to nearest at the size of uniform 3 bits, the bits that the evolved proxy allocates are worth {glue:text}`rtn_gain:.1f` points of top-1 more than uniform
# ones ({glue:text}`rtn_gain_lo:.1f` to {glue:text}`rtn_gain_hi:.1f`). Reconstructed block after block, they are worth {glue:text}`brecq_gain_at_three:.1f`
# ({glue:text}`brecq_gain_at_three_lo:.1f` to {glue:text}`brecq_gain_at_three_hi:.1f`): good rounding repairs most of what good bits would have avoided. The packed file holds exactly the
# bytes that were claimed, behind a header of {glue:text}`header:.0f` bytes, and another runtime predicts the same from what is exported.

# %% [markdown]
# | you need | |
# |---|---|
# | earlier chapters | 04 |
# | files read | `model.safetensors`, `layers.csv`, `quantization.csv`, `comparison.parquet`, `runtimes.csv` of the study; `comparison.parquet` of the others; `benchmarks/reconstruction.json` |
# | with `REBUILD = True` | reconstructs, trains and times, too (manifest in chapter 01) |

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # study to show
REBUILD: bool = False  # True: compute the study here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import dataclasses
import json
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pandas as pd
import torch
from scipy.stats import binomtest, norm

from book.making.chapter import start_chapter
from book.making.plots import plot_dots, plot_quantizers
from book.making.tables import show_source, show_table, with_interval
from book.places import REPOSITORY
from book.studies import allocation, margins, quantization, runtimes
from book.studies.bench import load_layers
from book.studies.images import load_dataset
from book.studies.networks import (
    build_network,
    fresh_model,
    layer_table,
    load_checkpoint,
)
from book.studies.study import checked_path, has_study, manifest_of, read_facts
from emq_lib.core import networks, quantizers
from emq_lib.core.bank import build_weight_bank
from emq_lib.core.configs import parse_bits
from emq_lib.core.errors import InvalidParameterError
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.models import predict, top1
from emq_lib.core.profiles import profile_names
from emq_lib.quantization import onnx_export, quantize
from emq_lib.quantization.brecq import LAPTOP, PAPER
from emq_lib.quantization.packed import (
    header_bytes,
    load_network,
    load_packed,
    pack_codes,
    payload_bytes,
    save_network,
    save_packed,
    unpack_codes,
)
from emq_lib.quantization.qat import QatRecipe

chapter = start_chapter("05_quantization", PROFILE, REBUILD, SEED)

# %% [markdown]
# With `REBUILD = True` the next cell quantizes what every method chose in chapter 04 by every quantizer, and exports and times some of the networks.
# It can be interrupted and run again; what was measured is kept.

# %%
if chapter.rebuild:
    images = load_dataset(chapter.profile)
    quantization.build_comparison(
        chapter.profile,
        images,
        quantizers=("rtn", "adaround", "brecq", "qat"),
        epochs=10,
    )
    runtimes.build_runtimes(chapter.profile, images)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Packing by hand
#
# Four 2-bit codes fit into one byte: the first takes the lowest two bits, the next the two above, and so on.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
codes = np.array([3, 0, 2, 1], dtype=np.uint8)
by_hand = codes[0] + codes[1] * 4 + codes[2] * 16 + codes[3] * 64
assert pack_codes(codes, 2).tolist() == [by_hand]
by_hand

# %% [markdown]
# Three-bit codes straddle bytes: eight of them take three. Unpacking gives back every code.

# %%
codes = np.arange(8, dtype=np.uint8)
packed = pack_codes(codes, 3)
assert np.array_equal(unpack_codes(packed, 3, 8), codes)
packed.nbytes

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A network on disk
#
# Take the configuration that the proxy evolved for allocation chose at 2.5 bits on average, quantize the study's checkpoint, and write it into one file: packed
# codes, scales, zero points and biases, nothing else.

# %%
results = allocation.load_quantization(chapter.profile)
row = results.query(
    "proxy == 'evolved for allocation' and average_bits == 2.5"
).iloc[0]
config = parse_bits(row.bits)
model = fold_batchnorm(
    load_checkpoint(
        chapter.profile, checked_path(chapter.profile, "model.safetensors")
    )
)
layers = load_layers(chapter.profile)
bank = build_weight_bank(model, layers, chapter.profile.choices)
weights = bank.select(config)
biases = {name: model.get_submodule(name).bias for name in weights}

# %% slideshow={"slide_type": "-"}
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "network.safetensors"
    save_packed(
        path, weights, biases, metadata={"profile": chapter.profile.name}
    )
    on_disk, header = path.stat().st_size, header_bytes(path)
    loaded, loaded_biases, *_ = load_packed(path)
assert on_disk - header == row.size_bytes
chapter.claim(
    "payload",
    "The payload has {:,.0f} bytes, as claimed.",
    on_disk - header,
    within=(row.size_bytes, row.size_bytes),
)

# %% slideshow={"slide_type": "-"}
chapter.claim(
    "header",
    "The header of the file has {:,.0f} bytes.",
    header,
    within=(100, 8_000),
)

# %% [markdown]
# What comes back is the same network, to the last bit:

# %% slideshow={"slide_type": "-"}
assert all(
    torch.equal(loaded[name].dequantize(), weights[name].dequantize())
    for name in weights
)
assert all(torch.equal(loaded_biases[name], biases[name]) for name in weights)
float_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
chapter.claim(
    "compression",
    "The file is {:.1f} times smaller than the folded float network.",
    float_bytes / on_disk,
    within=(4, 16),
)

# %% [markdown]
# On the digits the whole way runs live: quantize, pack, load into a network of random weights, and classify. `save_network` writes what is left of a network too: the ranges
# of the inputs, and layers that stay in floating point.

# %%
digits = chapter.study("digits-resnet8")
data = load_dataset(digits)
network, _ = build_network(digits, data)
expected = predict(network.select((4, 3, 3, 2, 3, 4)), data.test)
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "digits.safetensors"
    save_network(path, network)
    again = load_network(path, fresh_model(digits))
assert torch.equal(predict(again, data.test), expected)
top1(expected, data.test.labels)

# %%
show_source(save_network)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Any network, by patterns
#
# The steps above in one call: patterns over the names of layers say who gets how many bits, and the plan is shown before anything runs. What no pattern matches gets the default; the first and the
# last layer keep 8 bits unless a pattern says otherwise.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
trained = load_checkpoint(digits, checked_path(digits, "model.safetensors"))
by_patterns = quantize.quantize_model(
    trained, data.calibration, bits={"layer[12].*": 4}, default=2
)

# %% [markdown]
# A layer that two patterns match would be ambiguous, so it is an error that names both:

# %%
try:
    quantize.quantize_model(
        trained, data.calibration, bits={"layer1.*": 4, "*.conv1": 3}
    )
except InvalidParameterError as error:
    print(error)

# %% [markdown] slideshow={"slide_type": "slide"}
# Rounding to nearest is the cheapest method. *AdaRound* {cite:p}`adaround` learns for each weight of a layer whether to round up or down, so that the layer's output changes least; *BRECQ*
# {cite:p}`brecq` does so for a block at a time, on the inputs that the quantized blocks before it give, and then learns the steps of the activations. Its paper takes 20,000 steps per block;
# here it is a few hundred. *QAT* trains the whole network while it is rounded {cite:p}`lsq`: weights and steps are learned, from the labels and from the float network's outputs. All layers at 2
# bits:

# %% slideshow={"slide_type": "-"}
methods = {
    method: quantize.quantize_model(
        trained,
        data.calibration,
        default=2,
        ends=None,
        method=method,
        settings=LAPTOP,
        training=data.train,
        recipe=QatRecipe.like(digits.training, epochs=10),
        verbose=False,
    )
    for method in quantize.METHODS
}
accuracy = {
    method: top1(predict(one, data.test), data.test.labels)
    for method, one in methods.items()
}
pd.Series(accuracy).round(1)

# %% slideshow={"slide_type": "-"}
before, after = accuracy["rtn"] / 100, accuracy["brecq"] / 100
margin = 1.96 * np.sqrt(
    (before * (1 - before) + after * (1 - after)) / len(data.test)
)
chapter.claim(
    "brecq_gain",
    "On the digits, with every layer at 2 bits, reconstruction in order gains {:.1f} points over rounding to nearest.",
    100 * (after - before),
    within=(1, 90),
    interval=(
        100 * (after - before - margin),
        100 * (after - before + margin),
    ),
    n=len(data.test),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Another runtime
#
# Do these numbers hold outside PyTorch? ONNX describes quantization by pairs of nodes, one that rounds and one that restores (QDQ). It knows 4-bit and 8-bit integers, so weights of 2 and 3 bits are
# stored in four. onnxruntime reads the file and knows nothing of this book:

# %%
options = onnxruntime.SessionOptions()
options.graph_optimization_level = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
)
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "digits.onnx"
    onnx_export.save_onnx(path, by_patterns, data.test[:1].inputs())
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    onnx_bytes = path.stat().st_size
images = {"images": data.test.inputs().contiguous().numpy()}
there = torch.from_numpy(session.run(None, images)[0]).argmax(dim=1)
here = predict(by_patterns, data.test).argmax(dim=1)

# %% slideshow={"slide_type": "-"}
same = int((there == here).sum())
chapter.claim(
    "onnx_agreement",
    "onnxruntime and PyTorch predict the same class for {:.1f} % of the test images of the digits.",
    100 * same / len(here),
    within=(97, 100),
    interval=tuple(
        100
        * np.array(binomtest(same, len(here)).proportion_ci(method="wilson"))
    ),
    n=len(here),
)

# %% [markdown]
# Predictions can differ where a sum of products falls on the other side of a rounding: here sums are exact integers, there they are floats, whose last bit depends on the order. With
# `exact=True` the file restores integers and multiplies by the scales afterwards, and any runtime computes the same sums. The study's own networks on all of its test images, how many of
# which get the class that PyTorch gives, and what the files weigh (the ONNX files also hold the graph, and their 2-bit weights take 4):

# %%
outside = runtimes.load_runtimes(chapter.profile).set_index("network")
seen = int(outside["images"].iloc[0])
ways = {
    "same_packed": "packed file",
    "same_exact": "ONNX, exact sums",
    "same_qdq": "ONNX, scales in QDQ",
    "same_optimized": "and optimized",
}
shares = (100 * outside[list(ways)] / seen).rename(columns=ways)
shares["ONNX (bytes)"] = outside["file_bytes"]
shares["packed (bytes)"] = outside["packed_bytes"]
show_table(shares.reset_index(), decimals=2)

# %%
quantized = outside.drop(index="float")
chapter.claim(
    "same_outside",
    "With exact sums, onnxruntime gives PyTorch's class to at least {:.2f} % of the test images.",
    100 * quantized["same_exact"].min() / seen,
    within=(99.9, 100),
    n=seen,
)

# %%
chapter.claim(
    "same_packed",
    "A network of nothing but the packed file gives the same logits for at least {:.2f} % of the test images.",
    100 * quantized["same_packed"].min() / seen,
    within=(100, 100),
    n=seen,
)

# %% [markdown]
# Is a smaller file a faster network? onnxruntime on one thread, all networks taking turns, as a ratio to the float network:

# %%
timed = pd.DataFrame(
    {
        f"batch of {batch}: {what}": outside[f"{column}_{batch}"]
        for batch in runtimes.BATCHES
        for what, column in (
            ("ms per image", "ms"),
            ("ratio", "ratio"),
            ("from", "lo"),
            ("to", "hi"),
        )
    }
)
show_table(timed.reset_index(), decimals=2)

# %%
mixed = f"{runtimes.MIXED}, {runtimes.AVERAGE}"
chapter.claim(
    "low_bits_time",
    "Fewer bits make nothing faster on this processor: the mixed network takes {:.2f} times as long as the float one.",
    outside.loc[mixed, "ratio_32"],
    within=(1, 10),
    interval=(outside.loc[mixed, "lo_32"], outside.loc[mixed, "hi_32"]),
    n=runtimes.ROUNDS,
)

# %% [markdown]
# ## The table
#
# Each method's choice at each budget, quantized and measured on all test images, next to the uniform configurations and to the mean of
# random ones of the same size.

# %%
float_top1 = read_facts(chapter.profile, "model.safetensors")["top1"]
chapter.claim(
    "float_accuracy",
    "The float network has {:.2f} %.",
    float_top1,
    within={"cifar10-resnet20": (90, 91.25)},
)

# %%
budgets = results[
    results["average_bits"].isin(chapter.profile.budgets)
    & (results["variant"] != "as_released")
]
table = budgets.pivot_table(
    index="proxy", columns="average_bits", values="top1", aggfunc="mean"
)
show_table(table.sort_values(3.0, ascending=False).reset_index(), decimals=1)

# %% tags=["hide-input"] slideshow={"slide_type": "slide"} mystnb={"figure": {"caption": "Top-1 of each method's choice, one symbol per budget; the dashed line is the float network. The methods part most where the budget is tight.", "name": "fig-05-1"}, "image": {"alt": "One row per method with a dot per budget on an axis of top-1; the dots of tight budgets lie far left and spread most."}}
figure, ax = plt.subplots(figsize=(6.5, 7.5))
plot_dots(table.sort_values(3.0, ascending=False), float_top1=float_top1, ax=ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Under better quantizers
#
# Now every choice is quantized three ways, from three seeds: a seed draws the calibration images, the batches of reconstruction and the random configuration. Besides one random configuration per
# seed there is the best of as many as the search looked at, chosen, as the evolved formula was, on half A; what follows is measured on the other test images. Each cell holds the mean over
# seeds and images with its 95 % interval; differences between methods, further down, are taken image by image and are known much better. QAT trains a network for every cell, so it takes the choices
# of three methods at two budgets; for how many epochs, and for how many steps BRECQ runs, stands in the manifest (chapter 01). The bit sum's choices are those of parameter-greedy
# (chapter 04).

# %%
compared = quantization.load_comparison(chapter.profile)
hits = margins.held_out_hits(chapter.profile, compared)
means = hits.map(margins.mean_of)
exact = hits.xs("float", level="quantizer").iloc[0]
names = {
    "rtn": "to nearest",
    "adaround": "AdaRound",
    "brecq": "BRECQ",
    "qat": "QAT",
}
order = [*quantization.COMPARED, quantization.BEST_OF_RANDOM]


def as_texts(found):
    """Return means with their intervals as texts; what rounds to zero has no sign."""
    texts = with_interval(found, "value", "lo", "hi", decimals=1)
    return np.array([text.replace("-0.0", "0.0") for text in texts], object)


def show_by_budget(texts):
    """Show one table for each quantizer: methods by average bits."""
    for quantizer in names:
        if quantizer in texts.index.unique(0):
            wide = texts[quantizer].unstack(0).sort_index(axis=1)
            wide = wide.reindex([name for name in order if name in wide.index])
            wide = wide.fillna("–").rename_axis(names[quantizer])
            show_table(wide.reset_index())


estimates = pd.DataFrame(map(dataclasses.asdict, means), index=means.index)
shown = as_texts(estimates[["value", "lo", "hi"]].clip(0, 100))
show_by_budget(pd.Series(shown, index=means.index))

# %% slideshow={"slide_type": "slide"} tags=["hide-input"] mystnb={"figure": {"caption": "Top-1 on images that no search has seen, against average bits, one panel per quantizer; the dashed line is the float network. Rounding to nearest parts the methods, reconstruction brings them together.", "name": "fig-05-2"}, "image": {"alt": "Three panels of curves that rise with average bits; they lie far apart when weights are rounded to nearest and close together, near the float network, after reconstruction."}}
plot_quantizers(
    {
        name: means[quantizer]
        for quantizer, name in names.items()
        if quantizer in ("rtn", "adaround", "brecq")
    },
    float_top1=100 * exact.mean(),
)
plt.show()

# %%
versus = margins.compare_methods(
    chapter.profile, compared, "evolved for allocation"
).set_index(["quantizer", "average_bits", "proxy"])


def claim_difference(key: str, sentence: str, place: tuple, within: dict):
    """State by how much the evolved choice is above another one."""
    found = versus.loc[place]
    return chapter.claim(
        key,
        sentence,
        found["value"],
        within=within,
        interval=(found["lo"], found["hi"]),
        n=int(found["images"]),
    )


claim_difference(
    "rtn_gain",
    "Rounded to nearest, the evolved choice at the size of uniform 3 bits is {:.1f} points above uniform 3 bits.",
    ("rtn", 3.0, "uniform"),
    {"cifar10-resnet20": (1, 4)},
)

# %%
chapter.claim(
    "rtn_room",
    "No choice could gain more than {:.1f} points there: that is what uniform 3 bits lose.",
    (mean := margins.mean_of(exact - hits["rtn", 3.0, "uniform"])).value,
    within={"cifar10-resnet20": (2, 5)},
    interval=(mean.lo, mean.hi),
    n=mean.images,
)

# %%
claim_difference(
    "brecq_gain_at_three",
    "Under BRECQ it is {:.1f} points above.",
    ("brecq", 3.0, "uniform"),
    {"cifar10-resnet20": (-0.5, 1.5)},
)

# %%
lost = margins.mean_of(exact - hits["brecq", 3.0, "uniform"])
chapter.claim(
    "brecq_lost",
    "Under BRECQ uniform 3 bits lose {:.1f} points against the float network.",
    lost.value,
    within={"cifar10-resnet20": (0, 3)},
    interval=(lost.lo, lost.hi),
    n=lost.images,
)

# %%
tight = margins.mean_of(exact - hits["brecq", 2.25, "evolved for allocation"])
chapter.claim(
    "brecq_tight",
    "Under BRECQ the evolved choice at 2.25 bits on average loses {:.1f} points against the float network.",
    tight.value,
    within={"cifar10-resnet20": (0, 4)},
    interval=(tight.lo, tight.hi),
    n=tight.images,
)

# %% [markdown]
# By how much is the evolved choice above the others, image by image? Differences in points with 95 % intervals; a star marks those whose p-value, adjusted by Holm's method within a quantizer
# and a budget, is below 5 %.


# %%
def starred(found):
    """Return differences with their intervals as texts, significant ones with a star."""
    return as_texts(found) + np.where(found["holm"] < 0.05, "*", "")


show_by_budget(pd.Series(starred(versus), index=versus.index))

# %%
tested = versus.query("average_bits <= 3").drop(
    index=["uniform", "random"], level="proxy", errors="ignore"
)
below = int(((tested["holm"] < 0.05) & (tested["value"] < 0)).sum())
chapter.claim(
    "times_below",
    f"In {{:.0f}} of {len(tested)} comparisons at 3 bits or fewer it is significantly below another method's choice.",
    below,
    within={"cifar10-resnet20": (0, 10)},
)

# %%
handmade = ("bit sum", "HAWQ-V2", "OMPQ", "one-layer KL")
ahead = tested[(tested["holm"] < 0.05) & (tested["value"] > 0)]
ahead = ahead.query("average_bits < 3 and quantizer in ('rtn', 'brecq')")
pairs = {
    (average, proxy) for _, average, proxy in ahead.index if proxy in handmade
}
chapter.claim(
    "pairs_above",
    f"At 2.25 and 2.5 bits it is significantly above a hand-made proxy's choice, rounded to nearest or reconstructed, in {{:.0f}} of {2 * len(handmade)} cases.",
    len(pairs),
    within={"cifar10-resnet20": (0, 8)},
)

# %% [markdown]
# What does a choice cost, and what does it weigh? Seconds of scoring and allocating, for the best random one of measuring; bytes and bit operations; and the seconds of one quantization, on one
# thread. The evolved formula was searched once for all budgets, which took {glue:text}`search_minutes:.0f` minutes for all the searches of chapter 03 together.

# %%
chapter.claim(
    "search_minutes",
    "The searches of chapter 03 took {:.0f} minutes together.",
    manifest_of(chapter.profile).get("evolution.jsonl", {"seconds": 0.0})[
        "seconds"
    ]
    / 60,
    within=(0, 600),
)

# %%
costs = compared.query("quantizer == 'rtn' and seed == 0")[
    ["proxy", "average_bits", "size_bytes", "bops", "search_seconds"]
]
show_table(
    costs.assign(bops=costs["bops"] / 1e9)
    .rename(columns={"bops": "BOPs (G)", "search_seconds": "search (s)"})
    .sort_values(["average_bits", "proxy"]),
    decimals=2,
)

# %%
show_table(
    compared.groupby("quantizer", sort=False)["quantize_seconds"]
    .agg(["median", "max", "size"])
    .drop(index="float")
    .rename(index=names)
    .set_axis(["median (s)", "longest (s)", "networks"], axis=1)
    .reset_index(),
    decimals=1,
)

# %%
plain = json.loads(
    (REPOSITORY / "benchmarks" / "reconstruction.json").read_text()
)["cifar10-resnet20"]
chapter.claim(
    "reconstruction_ratio",
    "Reconstruction is {:.1f} times as fast as a plain loop that runs both networks from the images in every step.",
    plain["ratio"],
    within=(1, 100),
)

# %%
chapter.claim(
    "same_roundings",
    "On the same batches both round {:.1f} % of the weights of cifar10-resnet20 alike.",
    100 * plain["same roundings"],
    within=(98, 100),
)

# %%
chapter.claim(
    "paper_hours",
    f"With the {PAPER.iterations:,} steps per block of its paper it would take {{:.1f}} hours on two cores, weights only.",
    plain["predicted hours at the paper's iterations"]["ours"],
    within=(0.01, 100),
)

# %% [markdown]
# ## Other networks
#
# The same on every study for which it was measured: the evolved choice against uniform 3 bits, and at each budget against whichever hand-made choice turned out best there. Points with 95 %
# intervals, starred as above:

# %% tags=["hide-input"]
parts = []
for study in profile_names():
    other = chapter.study(study)
    if has_study(other, quantization.COMPARISON):
        part = margins.compare_methods(
            other, quantization.load_comparison(other), "evolved for allocation"
        )
        parts.append(part.query("average_bits <= 3").assign(study=study))
everywhere = pd.concat(parts, ignore_index=True)
uniform = everywhere[everywhere["proxy"] == "uniform"]
rivals = everywhere[everywhere["proxy"].isin(handmade)]
best = rivals.groupby(["study", "quantizer", "average_bits"])["value"].idxmin()
rows = pd.concat([uniform, rivals.loc[best]])
rows["against"] = np.where(rows["proxy"] == "uniform", "uniform", "hand-made")
rows["against"] += rows["average_bits"].map(" at {:g} bits".format)
rows["points"] = starred(rows)
rows.loc[rows["proxy"] != "uniform", "points"] += " " + rows["proxy"]
rows["study"] += ", " + rows["quantizer"].map(names)
rows["study"] += rows["seeds"].map(" (seeds: {:.0f})".format)
wide = rows.pivot(index="study", columns="against", values="points")
show_table(wide.fillna("–").reset_index())

# %%
gain = uniform.query("quantizer == 'rtn'").nlargest(1, "value").squeeze()
chapter.claim(
    "others_gain",
    f"Rounded to nearest, it gains most over uniform 3 bits on {gain['study']}: {{:.1f}} points.",
    gain["value"],
    within={"cifar10-resnet20": (1, 15)},
    interval=(gain["lo"], gain["hi"]),
    n=int(gain["images"]),
)

# %%
others = everywhere[~everywhere["proxy"].isin(("uniform", "random"))]
worse = others[(others["holm"] < 0.05) & (others["value"] < 0)]
places = worse.groupby(["study", "quantizer", "average_bits"], sort=False)
where = [
    f"{study} ({names[quantizer]}, {average:g} bits, below {' and '.join(group['proxy'])})"
    for (study, quantizer, average), group in places
]
chapter.claim(
    "others_below",
    f"In {{:.0f}} of {len(others)} comparisons it is significantly below another method's choice: {'; '.join(where) or 'nowhere'}.",
    len(worse),
    within={"cifar10-resnet20": (0, 20)},
)

# %% [markdown]
# ## What the paper reports
#
# The paper quantizes ImageNet networks, which this study cannot rerun. Beside its rows, as later papers quote them, stands what configurations released with its code weigh on torchvision's
# ResNet-18; a released configuration need not be the one behind a row. The second one has a width for each of 18 slots, shortcuts following their block, but the code pours it into all 20
# convolutions in reading order, shortcuts included: the network that is then trained is larger than the one that is reported.

# %%
imagenet = chapter.study("imagenet-resnet18")
twenty = layer_table(fresh_model(imagenet).eval(), imagenet)
weights_of = dict(zip(twenty["name"], twenty["parameters"], strict=True))
slots_of = [name for name in weights_of if "downsample" not in name]


def mebibytes(widths: dict[str, int]) -> float:
    """Return the size of the weights of a ResNet-18 with a width for each layer, in MiB."""
    return sum(weights_of[name] * bits for name, bits in widths.items()) / 2**23


def following(config: str) -> dict[str, int]:
    """Give 18 widths to the layers, and to each shortcut the width of its block's second convolution."""
    widths = dict(zip(slots_of, map(int, config.split()), strict=True))
    shortcuts = [name for name in weights_of if "downsample" in name]
    return widths | {
        name: widths[name.replace("downsample.0", "conv2")]
        for name in shortcuts
    }


def in_reading_order(config: str) -> dict[str, int]:
    """Give 18 widths to the first 18 convolutions, shortcuts included, and 8 bits to what is left."""
    return dict.fromkeys(weights_of, 8) | dict(
        zip(weights_of, map(int, config.split()), strict=False)
    )


after_training = "4 3 4 4 4 4 4 3 3 3 3 3 4 3 2 2 3 3"
while_training = "8 6 8 8 7 8 8 8 8 8 4 8 6 4 4 4 4 8"
show_table(
    pd.DataFrame(
        {
            "paper reports": ["69.92 % at 4.0 MB", "72.28 % at 6.69 MB"],
            "slots as meant (MiB)": [
                mebibytes(following(config))
                for config in (after_training, while_training)
            ],
            "as the code reads them (MiB)": [
                mebibytes(following(after_training)),
                mebibytes(in_reading_order(while_training)),
            ],
        },
        index=pd.Index(
            ["ResNet-18, quantized after training", "ResNet-18, QAT"],
            name="network",
        ),
    ).reset_index(),
    decimals=1,
)

# %% [markdown]
# ## The best at three bits, over all methods

# %%
methods = table.drop(index=["uniform", "random"], errors="ignore")
images = int(results["n_a"].iloc[0] + results["n_b"].iloc[0])


def interval(percent: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy in percent over the test images."""
    found = binomtest(round(percent / 100 * images), images).proportion_ci(
        method="wilson"
    )
    return 100 * found.low, 100 * found.high


best = methods[3.0].max()
winners = ", ".join(methods.index[methods[3.0] == best])
chapter.claim(
    "best_at_three",
    f"Rounded to nearest, at 3 bits on average the best choice (by {winners}) has {{:.1f}} % top-1.",
    best,
    within={"cifar10-resnet20": (88, 91)},
    interval=interval(best),
    n=images,
)

# %% [markdown]
# How does the ranking by accuracy change from budget to budget? One row per method, 1 is best:

# %%
show_table(
    methods.rank(ascending=False).astype(int).sort_values(3.0).reset_index(),
    decimals=0,
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What we found
#
# - Rounded to nearest, a good allocation at the size of uniform 3 bits is worth {glue:text}`rtn_gain:.1f` points of the {glue:text}`rtn_room:.1f` that there are to gain.
# - Reconstruction leaves {glue:text}`brecq_lost:.1f` points to gain, and the choice of bits matters accordingly less; at 2.25 bits on average the evolved choice loses
#   {glue:text}`brecq_tight:.1f` points ({glue:text}`brecq_tight_lo:.1f` to {glue:text}`brecq_tight_hi:.1f`) against the float network.
# - Networks differ: over uniform 3 bits the gain, rounded to nearest, reaches {glue:text}`others_gain:.1f` points on one of them, and in {glue:text}`others_below:.0f` comparisons, named
#   above, the evolved choice is significantly below another.
# - The sizes are real: payload and claim agree to the byte, the loaded network is the same network, and another runtime gives the same class to {glue:text}`same_outside:.2f` % of
#   the test images.
# - A smaller file is not a faster network: below 8 bits this processor has no instructions for it, and the mixed network takes {glue:text}`low_bits_time:.2f` times as long as the float one.
# - No method wins at every budget, so a claim of the form "proxy X is best" needs its budget and its quantizer beside it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What could be wrong
#
# - Reconstruction runs a few hundred steps per block here, not the 20,000 of its paper. More steps would bring the methods still closer together.
# - Three seeds bound the luck of calibration images and batches, not that of the checkpoint: all rows are from one.
# - Latency was measured on one processor with one runtime. Others have kernels for 4-bit weights.
# - The best of many choices is also the luckiest of many.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Quiz
#
# 1. All searchable layers have 2 bits instead of 32. Is the file a sixteenth of the float one?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No. The first and the last layer keep 8 bits, and every channel brings a scale, a zero point and a bias that do not shrink. The smaller the layers, the more these weigh.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 2. Does a network with 3-bit weights classify faster than its float original?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# Not by itself. Ordinary processors compute with 8 bits or more, so narrow codes are first unpacked. What is certain is that less has to be stored and moved.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 3. What was loaded equals what was saved to the last bit. What has not been shown by that?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# That it classifies as well as the float network. Packing loses nothing; rounding before it did.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 4. PyTorch and another runtime predict different classes for a few images. Does that prove that the export is wrong?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# No. Sums in another order differ in the last bit, and a value near the middle between two levels then rounds the other way. A few images are to be expected; many are not.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 5. On the same test images two methods have overlapping 95 % intervals. Are they therefore not different?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# That does not follow. Both saw the same images, so most of the luck is common to both. Count the images that only one of them gets right, or compare on the same resamples.
# :::

# %% [markdown] slideshow={"slide_type": "-"}
# 6. Reconstruction brings a network with 2 bits everywhere close to the float one. Is choosing bits then pointless?

# %% [markdown] tags=["solution"]
# :::{dropdown} Answer
# At these widths there is then less to choose, and the order of the methods can change. Chapter 01 goes down to 1 bit to find a spread again. With a better quantizer the question moves to tighter budgets.
# :::

# %% [markdown]
# ## Exercises
#
# 1. *(by hand)* Pack the 4-bit codes 1, 15, 8 into bytes.
# 2. *(by hand)* Pack the 3-bit codes 5, 2, 7 into bytes.
# 3. *(by hand)* A layer has a 2 x 2 weight and two biases. How many bytes does it take in float32, how many packed at 2 bits?
# 4. *(by hand)* A layer multiplies the weights $(0.4, 0.4)$ with two inputs, and its grid has step 1. Which of the four ways to round down or up has the smallest squared error of the output when both
#    inputs are always equal to $\pm 1$? When the second is always minus the first?
# 5. *(from data/)* Which method has the largest difference between the halves A and B? Is it more than chance allows?
# 6. *(from data/)* How far is the best method from the median one at each budget?
# 7. *(longer)* Store scales as 16-bit floats. How many bytes does the study's network save, and how many predictions on the digits change?

# %% [markdown] tags=["solution"]
# :::{dropdown} Solutions
# 1. The first byte is $1 + 15 \cdot 16 = 241$, the second 8.
# 2. $5 + 2 \cdot 8 + 7 \cdot 64 = 469$; the low eight bits are 213, the ninth makes a second byte of 1.
# 3. Six floats are 24 bytes. Packed, the four codes are one byte, scales and zero points 10, biases 8: 19 bytes. The codes shrink sixteenfold, the layer hardly.
# 4. Equal inputs: the output is off by the sum of both errors. Both down: 0.8, squared 0.64. One up: 0.2, squared 0.04. Both up: 1.2, squared 1.44. So one goes up, although each for itself is nearer to 0. Opposite
#    inputs: the errors cancel if both are rounded the same way, so rounding to nearest is best.
# 5. See the cell below. The largest of many differences has to be compared with the largest that chance gives among so many.
# 6. See the cell below. Which method one takes matters most where the budget is tight.
# 7. See the cell below. A scale needs no more digits than the codes that it multiplies.
# :::

# %% tags=["hide-cell", "solution"]
codes = np.array([1, 15, 8], dtype=np.uint8)
assert pack_codes(codes, 4).tolist() == [241, 8]

# %% tags=["hide-cell", "solution"]
codes = np.array([5, 2, 7], dtype=np.uint8)
assert pack_codes(codes, 3).tolist() == [213, 1]

# %% tags=["hide-cell", "solution"]
bias = torch.zeros(2)
square = quantizers.quantize(torch.eye(2), bits=2)
assert torch.eye(2).nbytes + bias.nbytes == 24
assert payload_bytes({"layer": square}, {"layer": bias}) == 19

# %% tags=["hide-cell", "solution"]
ways = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])  # 1: rounded up
off = ways - 0.4
equal, opposite = ((off @ np.array(x)) ** 2 for x in ([1, 1], [1, -1]))
assert np.allclose(equal, [0.64, 0.04, 0.04, 1.44])
assert np.allclose(opposite, [0, 1, 1, 0])

# %% tags=["hide-cell", "solution"]
counts = budgets[["correct_a", "correct_b"]].to_numpy()
seen = budgets[["n_a", "n_b"]].to_numpy()
share = counts.sum(axis=1) / seen.sum(axis=1)
error = np.sqrt(share * (1 - share) * (1 / seen).sum(axis=1))
gap = pd.Series(np.diff(counts / seen)[:, 0] / error, index=budgets.index)
largest = budgets.loc[gap.abs().idxmax()]
allowed = norm.isf(0.025 / len(budgets))
print(
    f"{largest['proxy']}: {gap.abs().max():.1f} standard errors, {allowed:.1f} allowed among {len(budgets)}"
)
assert gap.abs().max() < allowed or not chapter.as_printed

# %% tags=["hide-cell", "solution"]
apart = methods.max() - methods.median()
assert apart.iloc[0] > apart.iloc[-1] or not chapter.as_printed
apart.round(1)

# %% tags=["hide-cell", "solution"]
rough = dataclasses.replace(
    network.bank,
    weights={
        key: dataclasses.replace(one, scale=one.scale.half().float())
        for key, one in network.bank.weights.items()
    },
)
again = networks.QuantizedNetwork(
    fold_batchnorm(trained), rough, network.activation_ranges
)
found = predict(again.select((4, 3, 3, 2, 3, 4)), data.test)
changed = (found.argmax(dim=1) != expected.argmax(dim=1)).sum().item()
assert changed < len(data.test) / 20
saved = sum(one.scale.numel() * 2 for one in weights.values())
assert saved == 2 * layers["channels"].sum()
saved, changed
