"""The table of other runtimes: what it says is what the files do."""

import numpy as np
import pytest

from book.studies import runtimes
from emq_lib.core.errors import MissingArtefactError


@pytest.mark.slow
def test_every_network_is_compared_and_timed(choices, profile, data, monkeypatch):
    monkeypatch.setattr(runtimes, "ROUNDS", 3)
    runtimes.build_runtimes(profile, data)
    table = runtimes.load_runtimes(profile).set_index("network")
    assert list(table.index) == ["float", "8 bits", "4 bits", "evolved for allocation, 2.5"]
    quantized = table.iloc[1:]
    assert (quantized[["same_packed", "same_exact"]] == len(data.test)).all(axis=None)
    assert (quantized["same_qdq"] > 0.97 * len(data.test)).all()
    assert (quantized["file_bytes"] < table.loc["float", "file_bytes"]).all()
    assert (table["ratio_1"].loc["float"], table["ratio_32"].loc["float"]) == (1, 1)
    assert (table[["ms_1", "ms_32", "lo_1"]] > -np.inf).all(axis=None)


def test_without_a_table_the_error_names_it(own_study, profile):
    (own_study / "runtimes.csv").unlink(missing_ok=True)
    with pytest.raises(MissingArtefactError, match="runtimes.csv"):
        runtimes.load_runtimes(profile)
