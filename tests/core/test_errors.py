"""Named errors: documented, and the same after a trip between processes."""

import inspect
import pickle

import pytest

from emq_lib.core import errors

NAMED = [error for error in vars(errors).values() if inspect.isclass(error) and issubclass(error, errors.EMQError)]


@pytest.mark.parametrize("error", NAMED)
def test_a_named_error_is_documented_and_travels(error):
    assert error.__doc__.strip().endswith(".")
    found = pickle.loads(pickle.dumps(error("what is wrong. What to do.")))
    assert type(found) is error
    assert str(found) == "what is wrong. What to do."


def test_a_stale_file_does_not_pass_for_a_missing_one():
    assert not issubclass(errors.StaleArtefactError, errors.MissingArtefactError)
    assert not issubclass(errors.CorruptArtefactError, errors.MissingArtefactError)
