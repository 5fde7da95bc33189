"""One live study of the digits, built once per test run and shared read-only."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil

import pandas as pd
import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, which looks only then

from book.places import REPOSITORY
from book.studies import bench, checkpoints, proxies
from book.studies.files import BENCH, CHOICES, MODEL, STATISTICS
from book.studies.images import load_dataset
from book.studies.origins import code_version
from book.studies.study import new_file
from emq_lib.core.profiles import get_profile

collect_ignore = ["making/small_study.py"]  # it changes the process that imports it


def pytest_collection_modifyitems(items):
    """Chapters first, which take longest, then the pages."""
    items.sort(key=lambda item: [item.get_closest_marker(marker) is None for marker in ("chapters", "browser")])


@pytest.fixture(scope="session")
def profile():
    """Return the digits study with a short training and a small bench: what most tests need, in seconds."""
    whole = get_profile("digits-resnet8")
    short = dataclasses.replace(whole.training, epochs=5)
    return dataclasses.replace(whole, training=short, bench_configs=70, stratified_configs=20)


@pytest.fixture(scope="session")
def data(profile):
    return load_dataset(profile)


@pytest.fixture(scope="session")
def cifar10():
    """Return the CIFAR-10 study and its real images; skip where there are none."""
    if not os.environ.get("EMQ_DATA_ROOT"):
        pytest.skip("EMQ_DATA_ROOT is not set: no CIFAR-10 images to check")
    profile = get_profile("cifar10-resnet20")
    return profile, load_dataset(profile)


@pytest.fixture(scope="session")
def built_study(profile, data):
    """Folder that holds a freshly trained and measured digits study, kept until the code that makes it changes."""
    versions = [repr(profile), *map(code_version, (MODEL, BENCH, STATISTICS))]
    root = REPOSITORY / "_build" / "tests" / hashlib.sha256("".join(versions).encode()).hexdigest()[:16]
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_STUDY_ROOT", str(root))
        if not (root / profile.name / STATISTICS).exists():
            for other in root.parent.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
            checkpoints.build_checkpoint(profile, data)
            bench.build_bench(profile, data)
            proxies.build_statistics(profile, data.calibration)
    return root


@pytest.fixture
def study(built_study, monkeypatch, profile):
    """Make the library read the live study; returns its folder, which the test must not change."""
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(built_study))
    return built_study / profile.name


@pytest.fixture
def own_study(built_study, tmp_path, monkeypatch, profile):
    """Return a copy of the live study that the test may damage."""
    shutil.copytree(built_study, tmp_path / "studies")
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path / "studies"))
    return tmp_path / "studies" / profile.name


@pytest.fixture
def choices(own_study, profile):
    """Write a small ``quantization.csv`` into a copy of the live study: three methods at the budgets of chapter 05."""
    methods = {
        "uniform": {3.0: "333333"},
        "one-layer KL": {2.25: "322222", 3.0: "433322"},
        "evolved for allocation": {2.25: "322222", 2.5: "333322", 3.0: "443322"},
        "random": {3.0: "234432"},
    }
    rows = [
        {"proxy": name, "variant": "x", "average_bits": average, "seed": 0, "bits": bits, "seconds": 1.0}
        for name, chosen in methods.items()
        for average, bits in chosen.items()
    ]
    table = pd.DataFrame(rows).assign(top1=50.0, size_bytes=1, bops=1, correct_a=1, correct_b=1, n_a=2, n_b=2)
    with new_file(profile, CHOICES, seconds=0.0, rows=len(table)) as path:
        table.to_csv(path, index=False)
    return table
