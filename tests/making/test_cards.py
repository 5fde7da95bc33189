"""Data cards say what is in the files, and say so when there are none."""

from book.making.cards import describe
from book.studies.bench import load_bench
from emq_lib.core.profiles import get_profile


def test_a_card_says_what_the_study_holds(study, profile):
    card = describe(profile).set_index("what")["content"]
    table = load_bench(profile).table
    assert card["rtn: rows"].startswith(f"{profile.bench_configs} random, {profile.stratified_configs} stratified")
    assert card["rtn: rows"].endswith(f"each on {table['n_a'].iloc[0] + table['n_b'].iloc[0]} test images")
    top1 = table.loc[table["sample"] == "random", "top1"]
    assert card["rtn, random: top-1"].startswith(f"{top1.min():.1f} to {top1.max():.1f} %")
    assert "adaround: rows" not in card
    assert "epochs" in card["limits"]


def test_a_profile_without_files_has_a_card_that_says_so():
    card = describe(get_profile("imagenet-resnet50")).set_index("what")["content"]
    assert card["published"].startswith("nothing")
    assert card["pinned"] == "conv1 at 8, fc at 8"
