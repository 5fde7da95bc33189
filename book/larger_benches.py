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

# %% [markdown]
# # What larger benches cost
#
# **Question.** How long would a bench take that is larger than the published ones: more configurations, a deeper
# network, ImageNet?
#
# **Answer.** Time is images times the multiply-accumulates that are left when neighbours share theirs, divided by a speed that depends
# on the kind of network. On the machine of the benchmark, two processor cores, 100,000 configurations of the book's main study would take
# {glue:text}`days_100k:.1f` days, and 2,000 configurations of ResNet-50 on all of ImageNet's validation images
# {glue:text}`days_resnet50:.0f` days. Blocks of configurations are independent, so machines divide that.
#
# | you need | |
# |---|---|
# | earlier chapters | [01](01_bench.ipynb) |
# | files read | `benchmarks/engine.json` and `benchmarks/scaling.json`, written by `make benchmarks` |

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # this page shows every study that was timed
REBUILD: bool = False  # nothing to compute here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import functools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from torch.fx import GraphModule

from book.making.chapter import start_chapter
from book.making.plots import plot_growth, plot_sizes
from book.making.tables import show_source, show_table
from book.places import REPOSITORY
from book.studies.networks import fresh_model, layer_table
from emq_lib.bench.engine import _Engine, planned_macs
from emq_lib.bench.sampling import sample_configs
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.profiles import Profile

chapter = start_chapter("larger_benches", PROFILE, REBUILD, SEED)
engine, scaling = (
    json.loads((REPOSITORY / "benchmarks" / name).read_text())
    for name in ("engine.json", "scaling.json")
)
show_table(
    pd.DataFrame(
        {name: run["hardware"] for name, run in engine.items()}
    ).T.reset_index(names="timed")
)

# %% [markdown]
# ## Against the plain way
#
# The plain way is what the released code does: for every configuration search the range of every layer's weight,
# round it, and run the network from its first layer on, batch norms in place. The engine selects from the bank,
# multiplies integers, and computes what neighbours share once:

# %%
show_source(_Engine)

# %% [markdown]
# Both answer on the same images in the same process, in turn. All preparation counts. An answer that differs is a value that
# lies between two codes and is rounded to one by float sums, to the other by whole numbers.

# %%
rates = {
    name: {
        "images": run["images"],
        "configurations": run["configurations"],
        "plain way, configurations per second": run[
            "configurations per second"
        ]["plain"],
        "engine, configurations per second": run["configurations per second"][
            "engine"
        ],
        "ratio": run["ratio"],
        "answers that differ, in a million": 1e6
        * run["answers that differ"]
        / run["answers"],
    }
    for name, run in engine.items()
}
show_table(pd.DataFrame(rates).reset_index(names=""))

# %%
chapter.claim(
    "engine_ratio",
    "On cifar10-resnet20 the engine is {:.1f} times as fast as the plain way.",
    engine["cifar10-resnet20"]["ratio"],
    within=(2, 100),
)

# %% [markdown]
# A short run is hard on the engine, whose preparation has few configurations to pay for it. The plain way has none and takes the same time for
# every configuration, so its rate can be held against the engine's longest run:

# %%
main = engine["cifar10-resnet20"]
longest = main["growth"][-1]
chapter.claim(
    "engine_ratio_long",
    f"At {longest['configurations']:,} configurations the engine is {{:.1f}} times as fast.",
    longest["configurations"]
    / longest["seconds"]
    / main["configurations per second"]["plain"],
    within=(2, 100),
)

# %% [markdown]
# ## More configurations
#
# Preparation, ranges and bank, is paid once. The rest grows a little more slowly than the number of configurations: among more of them,
# neighbours in lexicographic order agree on more of their first layers. How much is shared can be counted without running anything:

# %%
show_source(planned_macs)


# %%
@functools.cache
def network_of(profile: Profile) -> tuple[GraphModule, pd.DataFrame]:
    """Network with random weights, and its layer table."""
    model = fold_batchnorm(fresh_model(profile))
    return model, layer_table(model, profile)


def planned(name: str, count: int) -> int:
    """Multiply-accumulates of this many random configurations, for one image."""
    profile = chapter.study(name)
    model, layers = network_of(profile)
    rng, slots = profile.rng("benchmark"), layers["slot"].max() + 1
    drawn = sample_configs(slots, profile.choices, count, rng=rng)
    return planned_macs(model, layers, drawn[len(profile.choices) :])


# %% tags=["hide-input"] mystnb={"figure": {"caption": "Seconds against configurations on 1,000 images, both axes logarithmic. Dashed is growth in proportion from the first point: the measured lines fall below it, since preparation is paid once and more layers are shared.", "name": "fig-larger-1"}, "image": {"alt": "Rising lines of seconds against the number of configurations, one per study, each below its dashed line of proportional growth."}}
figure, ax = plt.subplots()
growth = {name: pd.DataFrame(run["growth"]) for name, run in engine.items()}
plot_growth(growth, ax=ax)
plt.show()

# %% [markdown]
# So a large run can be told from two small ones: from their times follow the preparation and the speed, and from the plan follows the work.
# For the longest run of the main study:

# %%
short, middle, *_, longest = growth["cifar10-resnet20"].to_dict("records")
work = {
    run["configurations"]: planned("cifar10-resnet20", run["configurations"])
    for run in (short, middle, longest)
}
line = np.polyfit(
    [work[run["configurations"]] for run in (short, middle)],
    [short["seconds"], middle["seconds"]],
    1,
)
predicted = np.polyval(line, work[longest["configurations"]])
chapter.claim(
    "growth_error",
    f"The prediction for {longest['configurations']:,} configurations is {{:+.0f}} % off what was measured.",
    100 * (predicted / longest["seconds"] - 1),
    within=(-30, 30),
)

# %%
chapter.claim(
    "memory_growth",
    f"From {short['configurations']} to {longest['configurations']:,} configurations peak memory grows by {{:.0f}} MiB.",
    longest["peak memory so far in MiB"] - short["peak memory so far in MiB"],
    within=(0, 500),
)

# %% [markdown]
# ## Larger networks
#
# What a network answers does not decide how long it takes. So networks of every size were timed with random weights on random images,
# ImageNet's among them, and nothing is said about accuracy.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Time of one configuration on one image against multiply-accumulates. Residual networks lie on a line; depthwise convolutions and transformers do little arithmetic for the memory that they move, and lie above it.", "name": "fig-larger-2"}, "image": {"alt": "Scatter on logarithmic axes of microseconds against multiply-accumulates; residual networks on a rising line, the two MobileNets and the transformer above it."}}
sizes = (
    pd.DataFrame(scaling)
    .T.drop(columns=["hardware", "seconds of each repeat"])
    .astype(float)
)
pairs = sizes["configurations"] * sizes["images"]
sizes["microseconds"] = 1e6 * sizes["seconds"] / pairs
sizes["GMACs per second"] = (
    sizes["planned MACs per image"] * sizes["images"] / sizes["seconds"] / 1e9
)
figure, ax = plt.subplots()
plot_sizes(sizes, ax=ax)
plt.show()

# %%
show_table(
    pd.DataFrame(
        {
            "million MACs": sizes["MACs per image"] / 1e6,
            "microseconds": sizes["microseconds"],
            "GMACs per second": sizes["GMACs per second"],
            "preparation (s)": sizes["seconds of preparation"],
            "memory (MiB)": sizes["peak memory in MiB"],
        }
    ).reset_index(names="profile"),
    decimals=0,
)

# %% [markdown]
# Had one only the small residual network of the main study, how far off would its speed be for the large ones?

# %%
own = sizes.loc["cifar10-resnet20", "GMACs per second"]
chapter.claim(
    "resnet50_error",
    "From the speed of cifar10-resnet20 the time of imagenet-resnet50 is predicted {:+.0f} % off what was measured.",
    100 * (sizes.loc["imagenet-resnet50", "GMACs per second"] / own - 1),
    within=(-80, 200),
)

# %% [markdown]
# ## What it would take
#
# Each prediction uses the measured speed of its own network. A cluster is {glue:text}`machines:.0f` such machines behind a scheduler of
# `dask.distributed` (`build_bench(..., scheduler=address)`). Two workers of one core each, on one machine, tell how
# much of the speed is lost by it.
#
# No GPU was timed. Its column is an *assumption*: a third of the 67 TFLOPS in float32 that the maker states for an H200, with two operations to a
# multiply-accumulate.

# %%
MACHINES, GPU_MACS = 100, 67e12 / 2 / 3
chapter.claim(
    "machines",
    "The cluster has {:.0f} machines.",
    MACHINES,
    within=(1, 10_000),
)

# %%
two = engine["cifar10-resnet20"]["two workers"]
chapter.claim(
    "sharing",
    "Two workers of one core each take {:.2f} times as long as one process on both cores.",
    two["seconds"] / two["seconds of one process"],
    within=(0.3, 4),
)

# %%
wanted = [
    ("cifar10-resnet20", 10_000, 10_000),
    ("cifar10-resnet20", 100_000, 10_000),
    ("imagenet-resnet18", 2_000, 50_000),
    ("imagenet-resnet50", 2_000, 50_000),
    ("imagenet-resnet50", 100_000, 50_000),
    ("imagenet-mobilenetv2", 2_000, 50_000),
]
costs = []
for name, configurations, images in wanted:
    macs = planned(name, configurations) * images
    days = macs / (1e9 * sizes.loc[name, "GMACs per second"]) / 86_400
    costs.append(
        {
            "profile": name,
            "configurations": f"{configurations:,}",
            "images": f"{images:,}",
            "one machine": days,
            "cluster": days / MACHINES,
            "one GPU (assumed)": macs / GPU_MACS / 86_400,
        }
    )
costs = pd.DataFrame(costs)
show_table(
    costs.rename(columns={"one machine": "days on one machine"}), decimals=3
)

# %%
chapter.claim(
    "days_100k",
    "100,000 configurations of cifar10-resnet20 on all test images would take {:.1f} days on this machine.",
    costs["one machine"][1],
    within=(0.1, 30),
)

# %%
chapter.claim(
    "days_resnet50",
    "2,000 configurations of imagenet-resnet50 on all validation images would take {:.0f} days.",
    costs["one machine"][3],
    within=(1, 3_000),
)

# %% [markdown]
# ## What could be wrong
#
# - One kind of machine. On processors without 8-bit instructions the engine multiplies in float32, at the same answers and
#   another speed.
# - The predictions leave out reading images and, under learned rounding, the reconstructions: these are $L \times |B|$ runs
#   of a few seconds each, once, but they grow with the square of a layer's inputs.
# - ImageNet's networks were timed on few images, with little heat and no other work on the machine. A run of weeks is not
#   so lucky. It need not be: rows are kept block by block, and the same call goes on after a crash.
