"""What a visitor imports: six names, quickly, without the book; and every module without a warning."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import emq_lib

ROOT = pathlib.Path(emq_lib.__file__).parent
UNWANTED = (
    "sphinx",
    "matplotlib",
    "seaborn",
    "IPython",
    "sklearn",
    "scipy",
    "statsmodels",
    "torchvision",
    "onnx",
    "book",
)


def _run(script: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout


@pytest.mark.slow
def test_the_six_names_come_quickly_and_alone():
    """Seconds of the processor, beyond torch's own import; a busy machine slows both."""
    found = json.loads(
        _run(
            "import json, sys, time, torch\n"
            "own = time.process_time()\n"
            "from emq_lib import Bench, choose_bits, quantize_model, save_network, load_network, save_onnx\n"
            "print(json.dumps([own, time.process_time() - own, sorted(sys.modules)]))"
        )
    )
    of_torch, beyond, modules = found
    assert not [name for name in modules if name.split(".")[0] in UNWANTED or name.startswith("emq_lib.evolution")]
    assert beyond < max(2.0, 0.8 * of_torch)


def test_importing_the_package_imports_nothing():
    assert json.loads(_run("import json, sys, emq_lib; print(json.dumps(sorted(sys.modules)))")).count("torch") == 0


def test_every_name_is_there_and_others_are_named():
    assert set(emq_lib.__all__) <= set(dir(emq_lib))
    assert all(getattr(emq_lib, name).__name__ == name for name in emq_lib.__all__)
    with pytest.raises(AttributeError, match="'emq_lib' has no attribute 'choose'; it has Bench"):
        _ = emq_lib.choose


@pytest.mark.slow
def test_every_module_is_imported_without_a_warning():
    modules = sorted(".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py"))
    _run(
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))",
        "-W",
        "error",
    )
