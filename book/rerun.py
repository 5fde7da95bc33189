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
# # Rerun it
#
# **Question.** What does it take to run these chapters again?
#
# **Answer.** Python 3.11 or newer, make, and one line. It installs the pinned environment into `.venv` and runs chapter 02 on the
# small study, which needs no images:
#
# ```bash
# make env && .venv/bin/papermill book/02_proxies.ipynb _build/02_proxies.ipynb -p PROFILE digits-resnet8
# ```

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # every study is shown here
REBUILD: bool = False  # nothing to compute here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
from book.making.chapter import read_costs, read_rebuild_costs, start_chapter
from book.making.tables import show_table
from book.places import repository_address
from emq_lib.core.profiles import profile_names

chapter = start_chapter("rerun", PROFILE, REBUILD, SEED)

# %% tags=["remove-input"]
if repository_address():
    print(f"git clone {repository_address()}")

# %% [markdown]
# ## One chapter, or all of them
#
# Every chapter is a notebook with three parameters, which `papermill --help-notebook book/02_proxies.ipynb` explains: `PROFILE` names the
# study, `REBUILD` says whether its tables are read from `data/` or computed and written there, and `SEED` asks for another draw of all that is
# random. The line that made a page stands at its top.
#
# ```bash
# make pages                                         # from the outputs that are there
# make book PROFILE=digits-resnet8                   # execute every chapter first
# make book PROFILE=digits-resnet8 REBUILD=1         # compute the study before
# make book PROFILE=digits-resnet8 REBUILD=1 SEED=1  # with another draw
# ```
#
# All of them build these pages, and they go to `_build/<profile>/html`. A study with another seed goes to `_build/<profile>/studies-seed-<seed>`; the published one stays
# as it is. `make help` lists the rest.
#
# ## What a chapter costs
#
# Seconds and peak memory of each chapter on the published tables, measured when its outputs were made:

# %%
units = {"memory": "memory (GiB)", "gpu_memory": "GPU memory (GiB)"}
show_table(read_costs().rename(columns=units), decimals=1)

# %% [markdown]
# ## What a study costs
#
# Computing one from the images instead of reading its tables, summed over its files, as their manifests say. Nothing is
# computed twice, and whatever is interrupted goes on where it was.

# %%
rebuild = read_rebuild_costs(profile_names())
chapter.claim(
    "longest_study",
    "The longest took {:.1f} hours on the devices named here.",
    rebuild.groupby("study")["hours"].sum().max(),
    within=(0, 1_000),
)

# %%
show_table(rebuild, decimals=2)

# %% [markdown]
# ## Where
#
# **A laptop** reads everything and rebuilds the digits. CIFAR-10 is read from the folder that `EMQ_DATA_ROOT` names, as torchvision leaves it
# there.
#
# **One GPU.** The library computes where its images are. Statistics and measuring follow, and the kernels run through Triton:
#
# ```python
# from book.studies.bench import build_bench
# from book.studies.images import load_dataset
# from emq_lib.core.profiles import get_profile
#
# profile = get_profile("cifar10-resnet20")
# build_bench(profile, load_dataset(profile).to("cuda"))
# ```
#
# Each piece of a network is then captured once at each of its bits as a CUDA graph and replayed, and nothing waits for an answer until a block of
# configurations is under way. Integers of at most 11 bits are exact in TF32, so its sums are those of a processor; ranges found on float
# activations are not, unless `torch.backends.cudnn.allow_tf32 = False`. No study of this book was computed on a GPU: what it runs was tested
# step by step on a processor, and `make test` compares the answers image by image where there is a GPU.
#
# **A cluster.** Blocks of configurations are independent. A scheduler runs whatever anybody sends to its port, so it listens on this machine
# alone, unless you name an address that only your own machines reach. Start it, and the workers, with this package installed (the extra
# `cluster`), and name the scheduler; workers need no images and no files:
#
# ```bash
# dask scheduler --host 127.0.0.1
# dask worker tcp://127.0.0.1:8786 --nthreads 1
# ```
#
# ```python
# build_bench(profile, load_dataset(profile), scheduler="tcp://127.0.0.1:8786")
# ```
#
# **Conda, Colab, Binder.** `conda env create -f environment.yml` gives the same pinned packages, and is what Binder builds. Once the
# repository has a public address, which stands in `_config.yml` alone, buttons at the top of each chapter open it on Colab and Binder, and each
# notebook begins with a cell that fetches the book and its environment where they are missing and does nothing where they are not.
