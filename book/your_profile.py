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
# # Add your own profile
#
# **Question.** How do I get a bench for a network that is not in the list?
#
# **Answer.** Register the network, register a profile, call two functions. On this page a plain convolutional network on
# the digits goes all the way; its {glue:text}`own_rows:.0f` configurations are measured while the page is built.
#
# | you need | |
# |---|---|
# | earlier chapters | [01](01_bench.ipynb) |
# | files read | none; the study is written to a temporary folder |

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # not used: this page makes its own
REBUILD: bool = False  # this page always computes
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import dataclasses
import os
import tempfile

from torch import nn

from book.making.chapter import start_chapter
from book.making.tables import show_table
from book.studies import bench, checkpoints
from book.studies.bench import load_bench
from book.studies.images import load_dataset
from book.studies.networks import fresh_model, layer_table
from book.studies.study import read_facts
from emq_lib.core import configs, training
from emq_lib.core.errors import UnsupportedModelError
from emq_lib.core.models import register_model
from emq_lib.core.profiles import Profile, TrainingRecipe, register

chapter = start_chapter("your_profile", PROFILE, REBUILD, SEED)

# %% [markdown]
# Studies live under `data/`, or under the folder that `EMQ_STUDY_ROOT` names. This page uses a folder of its own.

# %%
os.environ["EMQ_STUDY_ROOT"] = tempfile.mkdtemp()

# %% [markdown]
# ## The network
#
# Any `torch.nn.Module` whose forward pass `torch.fx` can trace: no control flow that depends on the data. Its convolutions and linear
# layers are what is quantized; each must be a module of its own and run once in a pass.


# %%
def plain() -> nn.Module:
    """Five convolutions, one after another, and a classifier."""
    widths = [(1, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
    blocks = [
        nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )
        for before, after, stride in widths
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*blocks, *head)


register_model("plain", plain)

# %% [markdown]
# ## The profile
#
# A profile is data: which network on which images, how it is trained, which bits its layers may take, how many configurations are
# measured. Whatever is not said has a default, and every random choice follows from the profile's seed.

# %%
profile = register(
    Profile(
        name="digits-plain",
        dataset="digits",
        model="plain",
        training=TrainingRecipe(
            epochs=12,
            batch_size=64,
            max_lr=0.2,
            crop_padding=1,
            flip=False,
            precision="float32",
        ),
        pinned=(("7", 8),),
        validation_images=198,
        calibration_images=256,
        bench_configs=150,
        stratified_configs=15,
    )
)

# %% [markdown]
# Before anything long starts, look at the layers: their order is the order of a configuration's bits, and the names are
# what `pinned` and `tied` refer to. Here the classifier is pinned at 8 bits, and the first convolution is searched.

# %%
layers = layer_table(fresh_model(profile), profile)
show_table(
    layers[["name", "shape", "parameters", "macs", "slot", "pinned_bits"]],
    decimals=0,
)

# %% [markdown]
# ## Checkpoint and bench
#
# Two calls. Both can be interrupted, even with `kill -9`, and called again.

# %%
images = load_dataset(profile)
checkpoints.build_checkpoint(profile, images)
bench.build_bench(profile, images)

# %%
own = load_bench(profile)
chapter.claim(
    "own_rows",
    "The bench has {:.0f} rows.",
    len(own),
    within=(150, 200),
)

# %%
chapter.claim(
    "own_top1",
    "The float network has {:.1f} % top-1.",
    read_facts(profile, "model.safetensors")["top1"],
    within=(85, 100),
    n=len(images.test),
)

# %% [markdown]
# What is the best of them that is no larger than the uniform 3-bit configuration?

# %%
three = own.query((3,) * 5)
best = own.best(size=three["size_bytes"])
chapter.claim(
    "own_gain",
    f"It is {configs.bits_text(best['bits'])}, {{:+.1f}} points of top-1 from uniform 3 bits.",
    best["top1"] - three["top1"],
    within=(0, 100),
)

# %% [markdown]
# A second call with a larger profile measures only what is missing:

# %%
larger = dataclasses.replace(profile, bench_configs=160)
bench.build_bench(larger, images)
len(load_bench(larger)) - len(own)

# %% [markdown]
# Weights that you trained elsewhere take the place of training: `store_checkpoint` measures them and writes them in the study's
# form.

# %%
state = fresh_model(profile)
result = training.TrainingResult(state.eval(), 0, (), 0.0)
checkpoints.store_checkpoint(profile, result, images)

# %% [markdown]
# (These were random weights. The bench of the old ones no longer belongs to this checkpoint, and a new call would measure every row
# again: rows are keyed by the checkpoint they were measured on.)
#
# ## When it does not fit
#
# Layers that share a weight, or run twice in one pass, have no bits of their own. The library says so before anything is
# measured.


# %%
class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        """Return logits."""
        x = self.again(self.again(self.first(x)).relu())
        return self.last(x.mean(dim=(2, 3)))


# %%
try:
    layer_table(Shared(), dataclasses.replace(profile, pinned=()))
except UnsupportedModelError as error:
    print(error)

# %% [markdown]
# ## The whole book on your study
#
# Put the two entries where the book finds them: the network into `MODELS` of `emq_lib/core/models.py`, the profile at the end of
# `emq_lib/core/profiles.py`. Then
#
# ```bash
# make book PROFILE=digits-plain REBUILD=1
# ```
#
# runs every chapter on it. Chapter 01 then also measures the same configurations under learned rounding
# (`build_bench(..., quantizer="adaround")`) and some of them with other calibration images and reconstructed in order
# (`checks.build_checks`, which needs three times as many training images as there are calibration images). On several machines, start a scheduler (`dask scheduler --host 127.0.0.1`; never on an open port) and workers, and give the address to
# `build_bench(profile, images, scheduler="tcp://...")`: workers need this package with your entries, but no images and no files of the
# study.
#
# Your own images: as an ImageFolder tree in ImageNet's form, `imagenet/train/<class>/` and `imagenet/val/<class>/` under
# `EMQ_DATA_ROOT`, with `dataset="imagenet"`, `training=None`, a network that has as many outputs as there are classes, and its
# trained weights through `store_checkpoint`.
#
# ## Exercises
#
# 1. *(by hand)* How many configurations does this profile have in all, and which share of them was measured?
# 2. *(by hand)* Pin the first convolution as well. How many slots are left, and what do the rows of the old bench become?
# 3. *(longer)* Tie the third convolution to the second, rebuild, and compare the spread of top-1.

# %% [markdown] tags=["solution"]
# :::{dropdown} Solutions
# 1. $3^5 = 243$; see the cell below.
# 2. Four. The rows are keyed by what is pinned, so none is taken over: the new bench is measured from the start.
# 3. `tied=(("2.0", "1.0"),)`. Four slots are left, and a configuration can no longer be good in one of the two layers only.
# :::

# %% tags=["hide-cell", "solution"]
assert 3**5 == 243
len(own) / 3**5
