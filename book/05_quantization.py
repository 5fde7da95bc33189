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
# **Answer.** At 3 bits on average the best choice keeps {glue:text}`best_at_three:.1f` % top-1 where uniform 3 bits keep
# {glue:text}`uniform_at_three:.1f` % and the float network has {glue:text}`float_accuracy:.1f` %. The packed file holds exactly the bytes that
# were claimed, behind a header of {glue:text}`header:.0f` bytes.

# %% [markdown]
# | you need | |
# |---|---|
# | earlier chapters | 04 |
# | files read | `model.safetensors`, `layers.csv`, `quantization.csv` of the study |
# | time and memory | a minute and 1 GB |

# %% tags=["parameters"]
PROFILE = "cifar10-resnet20"  # study to show
REBUILD = False  # nothing to compute here

# %% tags=["hide-input"]
import dataclasses
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pandas as pd
import torch
from emq_lib import export, quantization, quantizers
from emq_lib.artefacts import checked_path, read_facts
from emq_lib.bench import load_layers, parse_bits
from emq_lib.block_reconstruction import LAPTOP
from emq_lib.datasets import load_dataset
from emq_lib.errors import InvalidParameterError
from emq_lib.measuring import load_network
from emq_lib.models import fold_batchnorm, load_checkpoint, predict, top1
from emq_lib.profiles import get_profile
from emq_lib.report import plot_dots, show_source, show_table, start_chapter
from scipy.stats import binomtest, norm

chapter = start_chapter("05_quantization", PROFILE, REBUILD)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Packing by hand
#
# Four 2-bit codes fit into one byte: the first takes the lowest two bits, the next the two above, and so on.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
codes = np.array([3, 0, 2, 1], dtype=np.uint8)
by_hand = codes[0] + codes[1] * 4 + codes[2] * 16 + codes[3] * 64
assert export.pack_codes(codes, 2).tolist() == [by_hand]
by_hand

# %% [markdown]
# Three-bit codes straddle bytes: eight of them take three. Unpacking gives back every code.

# %%
codes = np.arange(8, dtype=np.uint8)
packed = export.pack_codes(codes, 3)
assert np.array_equal(export.unpack_codes(packed, 3, 8), codes)
packed.nbytes

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A network on disk
#
# Take the configuration that the proxy evolved for allocation chose at 2.5 bits on average, quantize the study's checkpoint, and write it into one file: packed
# codes, scales, zero points and biases, nothing else.

# %%
results = quantization.load_quantization(chapter.profile)
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
bank = quantizers.build_weight_bank(model, layers, chapter.profile.choices)
weights = bank.select(config)
biases = {name: model.get_submodule(name).bias for name in weights}

# %% slideshow={"slide_type": "-"}
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "network.safetensors"
    export.save_packed(
        path, weights, biases, metadata={"profile": chapter.profile.name}
    )
    on_disk, header = path.stat().st_size, export.header_bytes(path)
    loaded, loaded_biases, _ = export.load_packed(path)
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
# On the digits the whole way runs live: quantize, pack, load, build a network of nothing but the loaded weights, and classify.

# %%
digits = get_profile("digits-resnet8")
data = load_dataset(digits)
network, _ = load_network(digits, data)
chosen = network.bank.select((4, 3, 3, 2, 3, 4))
expected = predict(network.select((4, 3, 3, 2, 3, 4)), data.test)
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "digits.safetensors"
    export.save_packed(
        path,
        chosen,
        {name: network.layers[name].bias.flatten() for name in chosen},
    )
    loaded = export.load_packed(path)[0]
bank = dataclasses.replace(
    network.bank,
    weights={(name, weight.bits): weight for name, weight in loaded.items()},
)
model = fold_batchnorm(
    load_checkpoint(digits, checked_path(digits, "model.safetensors"))
)
again = quantizers.QuantizedNetwork(model, bank, network.activation_ranges)
assert torch.equal(
    predict(again.select((4, 3, 3, 2, 3, 4)), data.test), expected
)
top1(expected, data.test.labels)

# %%
show_source(export.save_packed)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Any network, by patterns
#
# The steps above in one call: patterns over the names of layers say who gets how many bits, and the plan is shown before anything runs. What no pattern matches gets the default; the first and the
# last layer keep 8 bits unless a pattern says otherwise.

# %% slideshow={"slide_type": "-"} tags=["slide-code"]
trained = load_checkpoint(digits, checked_path(digits, "model.safetensors"))
by_patterns = quantization.quantize_model(
    trained, data.calibration, bits={"layer[12].*": 4}, default=2
)

# %% [markdown]
# A layer that two patterns match would be ambiguous, so it is an error that names both:

# %%
try:
    quantization.quantize_model(
        trained, data.calibration, bits={"layer1.*": 4, "*.conv1": 3}
    )
except InvalidParameterError as error:
    print(error)

# %% [markdown] slideshow={"slide_type": "slide"}
# Rounding to nearest is the cheapest method. *AdaRound* learns for each weight of a layer whether to round up or down, so that the layer's output changes least; *BRECQ* does so for a
# block at a time, on the inputs that the quantized blocks before it give, and then learns the steps of the activations. Its paper takes 20,000 steps per block; here it is a few hundred. All layers
# at 2 bits:

# %% slideshow={"slide_type": "-"}
methods = {
    method: quantization.quantize_model(
        trained,
        data.calibration,
        default=2,
        ends=None,
        method=method,
        settings=LAPTOP,
        verbose=False,
    )
    for method in quantization.METHODS
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
    export.save_onnx(path, by_patterns, data.test[:1].inputs())
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
# Predictions can differ where a sum of products falls on the other side of a rounding: here sums are exact integers, there they are floats, whose last bit depends on the order. Graph
# optimizations are off, because they move the roundings. The file is larger than the packed one, since it also holds the graph, and its 2-bit weights take 4.

# %%
onnx_bytes

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

# %% slideshow={"slide_type": "slide"}
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
    f"At 3 bits on average the best choice (by {winners}) has {{:.1f}} % top-1.",
    best,
    within={"cifar10-resnet20": (88, 91)},
    interval=interval(best),
    n=images,
)

# %% slideshow={"slide_type": "-"}
uniform = table.loc["uniform", 3.0]
chapter.claim(
    "uniform_at_three",
    "Uniform 3 bits have {:.1f} % top-1.",
    uniform,
    within={"cifar10-resnet20": (86, 89)},
    interval=interval(uniform),
    n=images,
)

# %% [markdown] slideshow={"slide_type": "-"}
# The interval is that of the test images alone: differences smaller than it mean nothing. The evolved proxy was chosen with the help of
# half A of the test images, so here are its configurations on half B as well:

# %% slideshow={"slide_type": "-"}
halves = budgets[
    budgets["proxy"].isin(["evolved for allocation", "uniform", "one-layer KL"])
].assign(
    half_a=lambda t: 100 * t["correct_a"] / t["n_a"],
    half_b=lambda t: 100 * t["correct_b"] / t["n_b"],
)
show_table(
    halves[["proxy", "average_bits", "top1", "half_a", "half_b", "size_bytes"]],
    decimals=2,
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
# - At the size of uniform 3 bits a good allocation is worth {glue:text}`best_at_three:.1f` against
#   {glue:text}`uniform_at_three:.1f` %.
# - The size is real: payload and claim agree to the byte, and the loaded network is the same network.
# - Learned rounding repairs much of what rounding to nearest loses: {glue:text}`brecq_gain:.1f` points ({glue:text}`brecq_gain_lo:.1f` to {glue:text}`brecq_gain_hi:.1f`) on the
#   digits at 2 bits. Another runtime predicts the same class for {glue:text}`onnx_agreement:.1f` % of their images.
# - No method wins at every budget, so a claim of the form "proxy X is best" needs its budget beside it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What could be wrong
#
# - The weights are rounded to nearest and nothing is repaired afterwards. Reconstruction would lift all of them, the bad ones most.
# - A smaller file is not a faster network: below 8 bits ordinary processors have no instructions for it, and this book measures none.
# - Methods were compared on one checkpoint. The best of many choices is also the luckiest of many.

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
assert export.pack_codes(codes, 4).tolist() == [241, 8]

# %% tags=["hide-cell", "solution"]
codes = np.array([5, 2, 7], dtype=np.uint8)
assert export.pack_codes(codes, 3).tolist() == [213, 1]

# %% tags=["hide-cell", "solution"]
bias = torch.zeros(2)
square = quantizers.quantize(torch.eye(2), bits=2)
assert torch.eye(2).nbytes + bias.nbytes == 24
assert export.payload_bytes({"layer": square}, {"layer": bias}) == 19

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
assert gap.abs().max() < allowed

# %% tags=["hide-cell", "solution"]
apart = methods.max() - methods.median()
assert apart.iloc[0] > apart.iloc[-1]
apart.round(1)

# %% tags=["hide-cell", "solution"]
rough = dataclasses.replace(
    network.bank,
    weights={
        key: dataclasses.replace(one, scale=one.scale.half().float())
        for key, one in network.bank.weights.items()
    },
)
again = quantizers.QuantizedNetwork(
    fold_batchnorm(trained), rough, network.activation_ranges
)
found = predict(again.select((4, 3, 3, 2, 3, 4)), data.test)
changed = (found.argmax(dim=1) != expected.argmax(dim=1)).sum().item()
assert changed < len(data.test) / 20
saved = sum(one.scale.numel() * 2 for one in weights.values())
assert saved == 2 * layers["channels"].sum()
saved, changed
