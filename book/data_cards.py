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
# # Data cards
#
# One card for every study: what was measured, how, and what it cannot say. Everything on a card is computed from the files of
# the study when this page is built; where a profile has no files yet, the card says so.
#
# All benches share one form. A row is one configuration on real test images, with the weights of every layer rounded per output
# channel over the range that rounds with the least error ([chapter 01](01_bench.ipynb)). `rtn` rounds to nearest, `adaround`
# up or down so that the layer's output changes least. The tables open with pandas alone:
#
# ```python
# import pandas as pd
#
# rows = pd.read_parquet("data/cifar10-resnet20/bench.parquet")
# ```
#
# or, with queries, splits and budgets, through the library:
#
# ```python
# from emq_lib.bench import Bench
#
# bench = load_bench("cifar10-resnet20", quantizer="rtn")
# bench.within(size=(0, 100_000)).best()
# ```

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # this page shows every study
REBUILD: bool = False  # nothing to compute here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
from book.making.cards import describe
from book.making.chapter import start_chapter
from book.making.tables import show_table
from book.studies.study import has_study, manifest_of
from emq_lib.core.profiles import profile_names

chapter = start_chapter("data_cards", PROFILE, REBUILD, SEED)

# %%
profiles = map(chapter.study, profile_names())
studies = [
    profile for profile in profiles if has_study(profile, "bench.parquet")
]
chapter.claim(
    "bench_rows",
    f"{len(studies)} studies hold {{:,.0f}} measured configurations.",
    sum(manifest_of(study)["bench.parquet"]["rows"] for study in studies),
    within=(100, 1_000_000),
)

# %% [markdown]
# ## digits-resnet8
#
# The study that runs live in every chapter: small enough for a laptop, no images to fetch.

# %% tags=["hide-input"]
show_table(describe(chapter.study("digits-resnet8")))

# %% [markdown]
# ## cifar10-resnet20
#
# The book's main study: the smallest of the residual networks that its authors drew for CIFAR-10 {cite:p}`resnet`.

# %% tags=["hide-input"]
show_table(describe(chapter.study("cifar10-resnet20")))

# %% [markdown]
# ## cifar10-resnet18
#
# The paper's residual network at half width, for small images: a 3x3 stem, no pooling. Its slots are the paper's eighteen
# in the paper's order: stem and classifier are searched too, and the convolution in a shortcut takes the bits of its block's second
# convolution.

# %% tags=["hide-input"]
show_table(describe(chapter.study("cifar10-resnet18")))

# %% [markdown]
# ## cifar10-mobilenetv2
#
# The paper's second family, inverted residuals with depthwise convolutions, at half width and with strides for small images.

# %% tags=["hide-input"]
show_table(describe(chapter.study("cifar10-mobilenetv2")))

# %% [markdown]
# ## cifar10-vit-tiny
#
# A family that the paper does not have: a vision transformer of six blocks on patches of 4 x 4 pixels.

# %% tags=["hide-input"]
show_table(describe(chapter.study("cifar10-vit-tiny")))

# %% [markdown]
# ## imagenet-resnet18
#
# torchvision's network and weights on the reader's own images: `EMQ_DATA_ROOT` must hold `imagenet/train/<class>/` and
# `imagenet/val/<class>/`.

# %% tags=["hide-input"]
show_table(describe(chapter.study("imagenet-resnet18")))

# %% [markdown]
# ## imagenet-resnet50
#
# As above, deeper.

# %% tags=["hide-input"]
show_table(describe(chapter.study("imagenet-resnet50")))

# %% [markdown]
# ## imagenet-mobilenetv2
#
# As above, with depthwise convolutions.

# %% tags=["hide-input"]
show_table(describe(chapter.study("imagenet-mobilenetv2")))
