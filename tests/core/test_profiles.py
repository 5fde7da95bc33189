"""Profiles: named errors and independent random streams."""

import dataclasses

import numpy as np
import pytest

from emq_lib.core.errors import InvalidBitsError, UnknownProfileError
from emq_lib.core.profiles import get_profile


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(UnknownProfileError, match=r"Unknown profile 'resnet-9000'.*cifar10-resnet20, .*digits-resnet8"):
        get_profile("resnet-9000")


@pytest.mark.parametrize("choices", [(0, 2), (2, 9), (), (4, 2), (2, 2)])
def test_bad_choices_are_refused(choices):
    with pytest.raises(InvalidBitsError):
        dataclasses.replace(get_profile("digits-resnet8"), choices=choices)


def test_streams_repeat_and_differ_by_stage_and_seed():
    profile = get_profile("digits-resnet8")
    draws = [
        profile.rng("bench"),
        profile.rng("bench"),
        profile.rng("split"),
        dataclasses.replace(profile, seed=1).rng("bench"),
    ]
    first, again, other_stage, other_seed = (rng.random(4) for rng in draws)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other_stage)
    assert not np.allclose(first, other_seed)
