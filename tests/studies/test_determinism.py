"""The same study has the same bytes in another process: hash seed, time zone, language and threads do not count."""

import dataclasses
import os
import subprocess
import sys

import pytest
from killing import contents

from book.places import REPOSITORY
from book.studies import bench, checkpoints
from book.studies.images import load_dataset
from book.studies.study import study_folder
from emq_lib.core.profiles import get_profile
from emq_lib.quantization import adaround

ELSEWHERE = {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", "LC_ALL": "tr_TR.UTF-8", "OMP_NUM_THREADS": "2"}


def build() -> None:
    """Train for an epoch, and measure a few configurations under both quantizers."""
    adaround.ITERATIONS = 3
    profile = get_profile("digits-resnet8")
    short = dataclasses.replace(profile.training, epochs=1)
    few = {"bench_configs": 4, "stratified_configs": 3, "one_bit_configs": 2, "bench_images": 60}
    profile = dataclasses.replace(profile, training=short, **few)
    data = load_dataset(profile)
    checkpoints.build_checkpoint(profile, data)
    for quantizer in ("rtn", "adaround"):
        bench.build_bench(profile, data, quantizer=quantizer)


@pytest.mark.slow
def test_processes_agree_to_the_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", adaround.ITERATIONS)  # which building changes
    monkeypatch.setenv("EMQ_STUDY_ROOT", str(tmp_path / "here"))
    build()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch, test_determinism\n"
    code += "torch.set_num_threads(2); test_determinism.build(); assert torch.get_num_threads() == 2"
    environment = os.environ | ELSEWHERE | {"EMQ_STUDY_ROOT": str(tmp_path / "there")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    command = [sys.executable, "-W", "ignore", "-c", code, str(REPOSITORY / "tests" / "studies")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert set(here) == {
        f"digits-resnet8/{name}" for name in ("model.safetensors", "layers.csv", "bench.parquet", "manifest.json")
    }
    assert here == there
    assert (study_folder(get_profile("digits-resnet8")) / "bench.parquet").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
