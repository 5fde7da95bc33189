"""Profiles: impossible ones are refused by name, random streams are independent."""

import dataclasses

import numpy as np
import pytest

from emq_lib.core import profiles
from emq_lib.core.errors import (
    InfeasibleBudgetError,
    InvalidBitsError,
    InvalidParameterError,
    UnknownProfileError,
)
from emq_lib.core.models import INPUT_SHAPES
from emq_lib.core.profiles import DATASETS, EvolutionBudget, TrainingRecipe, get_profile, register

DIGITS = get_profile("digits-resnet8")
NO_COUNTS = [-1, 2.5, float("nan"), float("inf"), "10", None, True, [3], 1j, -(10**400)]


@pytest.mark.parametrize("name", ["resnet-9000", "", None, ["digits-resnet8"], 3, float("nan"), "../digits-resnet8"])
def test_unknown_profile_lists_the_known_ones(name):
    with pytest.raises(UnknownProfileError, match=r"Unknown profile .*cifar10-resnet20, .*digits-resnet8"):
        get_profile(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../escape",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "-rf",
        "a b",
        "a\n",
        "ü",
        "x" * 101,
        "a\0",
        "C:",
        3,
        None,
        ["a"],
    ],
)
def test_a_name_that_is_no_folders_is_refused(name):
    with pytest.raises(InvalidParameterError, match="The name of a profile"):
        dataclasses.replace(DIGITS, name=name)


@pytest.mark.parametrize(
    "choices",
    [(0, 2), (2, 9), (), (4, 2), (2, 2), (2.5, 3), (True, 2), "234", ("2", "3"), None, 3, (2, None), (2, float("nan"))],
)
def test_bad_choices_are_refused(choices):
    with pytest.raises(InvalidBitsError, match=r"profile 'digits-resnet8': choices"):
        dataclasses.replace(DIGITS, choices=choices)


def test_choices_are_kept_as_a_tuple():
    assert dataclasses.replace(DIGITS, choices=[2, 3]).choices == (2, 3)


@pytest.mark.parametrize("bits", [0, 9, *(value for value in NO_COUNTS if value != -1)])
def test_bad_widths_are_refused(bits):
    with pytest.raises(InvalidBitsError, match="activation_bits"):
        dataclasses.replace(DIGITS, activation_bits=bits)
    with pytest.raises(InvalidBitsError, match="pinned layer 'conv1'"):
        dataclasses.replace(DIGITS, pinned=(("conv1", bits),))


@pytest.mark.parametrize(
    "field",
    ["seed", "validation_images", "calibration_images", "bench_configs", "stratified_configs", "one_bit_configs"],
)
@pytest.mark.parametrize("value", NO_COUNTS)
def test_impossible_counts_are_refused(field, value):
    with pytest.raises(InvalidParameterError, match=f"profile 'digits-resnet8': {field} must be a whole number"):
        dataclasses.replace(DIGITS, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("validation_images", 0), ("calibration_images", 0), ("bench_configs", 0)]
    + [("bench_images", value) for value in (-3, 0, 1, 2.5, "all", True)],
)
def test_too_few_are_refused(field, value):
    with pytest.raises(InvalidParameterError, match=f"{field} must be a whole number"):
        dataclasses.replace(DIGITS, **{field: value})


@pytest.mark.parametrize(
    ("budgets", "error"),
    [((1.5, 3.0), InfeasibleBudgetError), ((-1.0,), InfeasibleBudgetError)]
    + [((value,), InvalidParameterError) for value in (float("nan"), float("inf"), "2.5", None, True, 1j, 10**400)]
    + [(value, InvalidParameterError) for value in ((), None, 2.5, "2.5", [2.5])],
)
def test_impossible_budgets_are_refused(budgets, error):
    with pytest.raises(error, match=r"profile 'digits-resnet8': .*budget"):
        dataclasses.replace(DIGITS, budgets=budgets)


@pytest.mark.parametrize(
    ("field", "value"),
    [("dataset", "mnist"), ("dataset", None), ("dataset", ["digits"]), ("quantizer", "gptq"), ("quantizer", 3)]
    + [("model", None), ("model", 3), ("training", {"epochs": 3}), ("training", 3), ("evolution", None)]
    + [
        ("pinned", None),
        ("pinned", "conv1"),
        ("pinned", ("conv1", 8)),
        ("pinned", (("conv1",),)),
        ("pinned", ((1, 8),)),
    ]
    + [("pinned", (("conv1", 8), ("conv1", 4))), ("tied", (("a", 3),)), ("tied", "ab"), ("tied", [("a", "b")])],
)
def test_what_is_of_another_kind_is_refused(field, value):
    with pytest.raises(InvalidParameterError, match="profile 'digits-resnet8'"):
        dataclasses.replace(DIGITS, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("population", value) for value in (*NO_COUNTS, 0, 3)]
    + [("iterations", value) for value in NO_COUNTS]
    + [("seeds", value) for value in (*NO_COUNTS, 0)],
)
def test_impossible_searches_are_refused(field, value):
    with pytest.raises(InvalidParameterError, match="must be a whole number"):
        EvolutionBudget(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("epochs", "batch_size") for value in (*NO_COUNTS, 0)]
    + [("crop_padding", value) for value in NO_COUNTS]
    + [("max_lr", value) for value in (0, -0.1, float("nan"), float("inf"), "0.1", None, True)]
    + [("momentum", value) for value in (0, 1, -0.1, float("nan"), "0.9", None)]
    + [("weight_decay", value) for value in (-1e-4, float("nan"), float("inf"), "0", None)]
    + [("flip", value) for value in (1, "yes", None)]
    + [("precision", value) for value in ("float16", None, 32)],
)
def test_impossible_recipes_are_refused(field, value):
    with pytest.raises(InvalidParameterError, match=field):
        TrainingRecipe(**{"epochs": 3, field: value})


@pytest.mark.parametrize("thing", [None, "digits-resnet8", {"name": "x"}, [DIGITS]])
def test_only_profiles_are_registered(thing, monkeypatch):
    monkeypatch.setattr(profiles, "_REGISTRY", dict(profiles._REGISTRY))
    before = profiles.profile_names()
    with pytest.raises(InvalidParameterError, match="takes a profile"):
        register(thing)
    assert profiles.profile_names() == before


def test_every_dataset_has_an_input_shape():
    assert set(INPUT_SHAPES) == set(DATASETS)


def test_streams_repeat_and_differ_by_stage_and_seed():
    draws = [
        DIGITS.rng("bench"),
        DIGITS.rng("bench"),
        DIGITS.rng("split"),
        dataclasses.replace(DIGITS, seed=1).rng("bench"),
    ]
    first, again, other_stage, other_seed = (rng.random(4) for rng in draws)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other_stage)
    assert not np.allclose(first, other_seed)
