"""The table of other runtimes: what it says is what the files do."""

import numpy as np
import pytest
import torch

from emq_lib import export, runtimes
from emq_lib.errors import MissingArtefactError
from emq_lib.measuring import load_network
from emq_lib.models import predict


def test_the_packed_file_alone_gives_the_same_numbers(study, profile, data, tmp_path):
    network, _ = load_network(profile, data)
    network.select((4, 3, 2, 3, 4, 2))
    path = tmp_path / "network.safetensors"
    biases = {name: layer.bias.flatten() for name, layer in network.layers.items()}
    export.save_packed(path, network.bank.select((4, 3, 2, 3, 4, 2)), biases)
    again = runtimes.packed_network(profile, path, network)
    assert torch.equal(predict(again, data.test), predict(network, data.test))


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
