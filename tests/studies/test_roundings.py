"""A bank of learned roundings that was interrupted goes on from the last layer, and is the same bank."""

import dataclasses
import errno
import os
import pathlib

import pytest
import torch

from book.studies import networks, roundings
from book.studies.study import sole_writer
from emq_lib.core.errors import CorruptArtefactError, DiskFullError
from emq_lib.quantization import adaround


@pytest.fixture
def learned(profile, monkeypatch):
    """Return the study with learned rounding, which few iterations learn."""
    monkeypatch.setattr(adaround, "ITERATIONS", 5)
    return dataclasses.replace(profile, quantizer="adaround", choices=(2, 3))


def _build(profile, data, folder):
    with sole_writer(profile):
        return networks.build_network(profile, data, folder=folder)[0].bank.weights


def _files(folder):
    return sorted(path.name for path in folder.glob("adaround-*"))


def _interrupted(profile, data, folder, monkeypatch, after):
    done, learn = [], adaround.adaround

    def stops(weight, bits, moments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(bits)
        return learn(weight, bits, moments)

    with monkeypatch.context() as patch:
        patch.setattr(adaround, "adaround", stops)
        with pytest.raises(KeyboardInterrupt):
            _build(profile, data, folder)


@pytest.mark.slow
def test_an_interrupted_bank_goes_on_and_is_the_same(own_study, learned, data, monkeypatch):
    whole = _build(learned, data, None)
    assert not _files(own_study)  # who only reads a study keeps nothing there
    _interrupted(learned, data, own_study, monkeypatch, after=5)
    counted, learn = [], adaround.adaround
    monkeypatch.setattr(adaround, "adaround", lambda *args: (counted.append(args[1]), learn(*args))[1])
    resumed = _build(learned, data, own_study)
    assert len(counted) == 12 - 5
    again = _build(learned, data, own_study)
    assert len(counted) == 12 - 5
    for bank in (resumed, again):
        assert bank.keys() == whole.keys()
        for entry, weight in whole.items():
            assert all(torch.equal(getattr(weight, part), getattr(bank[entry], part)) for part in ("codes", "scale"))
    roundings.remove_roundings(own_study)
    assert not _files(own_study)


@pytest.mark.slow
def test_other_images_other_weights_and_other_code_have_a_file_of_their_own(own_study, learned, data, monkeypatch):
    _interrupted(learned, data, own_study, monkeypatch, after=1)
    other = dataclasses.replace(data, calibration=data.train[50:90])
    _interrupted(learned, other, own_study, monkeypatch, after=0)
    _interrupted(learned, other, own_study, monkeypatch, after=1)
    assert len(_files(own_study)) == 2
    monkeypatch.setattr(roundings, "code_hash", lambda *_roots: "another")
    _interrupted(learned, data, own_study, monkeypatch, after=1)
    assert len(_files(own_study)) == 3


LINES = {
    "no JSON": b"codes\n",
    "no layer": b'{"bits": 2, "codes": ""}\n',
    "another layer": b'{"layer": "fc2", "bits": 2, "codes": ""}\n',
    "text for bits": b'{"layer": "layer1.0.conv1", "bits": "2", "codes": ""}\n',
    "many bits": b'{"layer": "layer1.0.conv1", "bits": 99, "codes": ""}\n',
    "no base64": b'{"layer": "layer1.0.conv1", "bits": 2, "codes": "@"}\n',
    "number for codes": b'{"layer": "layer1.0.conv1", "bits": 2, "codes": 3}\n',
    "few codes": b'{"layer": "layer1.0.conv1", "bits": 2, "codes": "AAAA"}\n',
}


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_lines_that_no_run_wrote_are_named(own_study, learned, data, monkeypatch, line):
    _interrupted(learned, data, own_study, monkeypatch, after=1)
    path = own_study / _files(own_study)[0]
    path.write_bytes(path.read_bytes() + line)
    before = path.read_bytes()
    with pytest.raises(CorruptArtefactError, match="line 3, was written by no run"):
        _build(learned, data, own_study)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_full_disk_is_named_and_what_was_finished_is_kept(own_study, learned, data, monkeypatch):
    _interrupted(learned, data, own_study, monkeypatch, after=3)
    path = own_study / _files(own_study)[0]
    before, opened = path.read_bytes(), pathlib.Path.open

    def full(place, mode="r", *args, **kwargs):
        if place == path and "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(place, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", full)
        with pytest.raises(DiskFullError, match="No room"):
            _build(learned, data, own_study)
    assert path.read_bytes() == before
    assert len(_build(learned, data, own_study)) == 12 + 2
