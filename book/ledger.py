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
# # Ledger
#
# Every number that the chapters claim, with its 95 % interval where it is an estimate, the number of observations behind it, the bounds that the
# claim asserts, what is known of the paper's number, and whether the two agree: whether our interval overlaps that of the paper's number, which for a rank
# correlation follows from its 50 configurations. They are of other networks and other images, so agreement is not to be expected of every number. The table is
# written by the chapters as they run; nothing in it is typed.

# %% tags=["parameters"]
PROFILE: str = "cifar10-resnet20"  # study to show
REBUILD: bool = False  # nothing to compute here
SEED: int = 0  # another number: another draw of all that is random

# %% tags=["hide-input"]
import pandas as pd

from book.making.chapter import read_ledger, start_chapter
from book.making.tables import show_table

chapter = start_chapter("ledger", PROFILE, REBUILD, SEED)

# %%
ledger = read_ledger(chapter)
assert ledger["key"].is_unique
ledger["n"] = ledger["n"].astype("Int64")


def shown(claim: pd.Series) -> str:
    """Return a value with its interval."""
    digits = ",.0f" if abs(claim["value"]) >= 1e4 else ".4g"
    ends = f" [{claim['lo']:.4g}, {claim['hi']:.4g}]"
    return f"{claim['value']:{digits}}" + (
        ends if pd.notna(claim["lo"]) else ""
    )


ledger["value"] = ledger.apply(shown, axis=1)
show_table(ledger[["chapter", "sentence", "value", "n", "paper", "agrees"]])

# %%
compared = ledger.loc[ledger["agrees"] != "", "agrees"]
chapter.claim(
    "agreeing",
    f"Of {len(compared)} claims that stand beside a number of the paper {{:.0f}} agree with it.",
    (compared == "yes").sum(),
    within=(0, len(compared)),
)

# %%
chapter.claim(
    "claims",
    "The chapters make {:.0f} claims, each of them computed above.",
    len(ledger),
    within=(20, 500),
)
