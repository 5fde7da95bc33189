"""A whole study of the digits, made by the command line with the smallest budgets, and what its builders looked at."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import pathlib
import sys

import pytest

from book.places import REPOSITORY
from book.studies import __main__ as command_line
from book.studies import allocation, checks, evolution, methods, quantization, runtimes
from book.studies.files import FILES
from book.studies.study import manifest_of
from emq_lib.core import profiles
from emq_lib.core.profiles import EvolutionBudget, Profile, get_profile
from emq_lib.proxies import intervals
from emq_lib.proxies.handmade import PROXIES
from emq_lib.quantization import adaround
from emq_lib.quantization.brecq import Settings

DIGITS = get_profile("digits-resnet8")
TINY = dataclasses.replace(
    DIGITS,
    name="tiny",
    training=dataclasses.replace(DIGITS.training, epochs=1),
    calibration_images=64,
    bench_configs=90,
    stratified_configs=90,
    one_bit_configs=4,
    bench_images=64,
    budgets=(2.5,),
    evolution=EvolutionBudget(population=5, iterations=3, seeds=1),
)
TWIN = dataclasses.replace(TINY, name="twin")
READERS = ("checked_path", "vouched_path", "has_study", "read_facts")
METHODS = (methods.EVOLUTION, *methods.EVOLVED.values())
_COPIERS = {  # they read every field, or what a file was made from, and decide nothing
    *(importlib.import_module(name).__file__ for name in ("dataclasses", "book.studies.origins", "book.studies.study")),
    command_line.__file__,
    "<string>",
}


@dataclasses.dataclass
class Look:
    """What one call of a builder made and looked at: files, fields of the profile, functions of the project."""

    made: set[str] = dataclasses.field(default_factory=set)
    files: set[str] = dataclasses.field(default_factory=set)
    fields: set[str] = dataclasses.field(default_factory=set)
    codes: set = dataclasses.field(default_factory=set)

    @property
    def functions(self) -> set[tuple[str, str]]:
        """(module, name) of the definitions at the top of modules that hold what ran."""
        return {place for code in self.codes for place in _definition(code.co_filename, code.co_firstlineno)}


def _definition(filename: str, line: int) -> list[tuple[str, str]]:
    return [place for first, last, place in _definitions(filename) if first <= line <= last]


@functools.cache
def _definitions(filename: str) -> list[tuple[int, int, tuple[str, str]]]:
    """Return first and last line, and (module, name), of the functions and classes of a file of the project."""
    path = pathlib.Path(filename)
    if not any(path.is_relative_to(REPOSITORY / package) for package in ("emq_lib", "book")):
        return []
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return [
        (min([node.lineno, *(part.lineno for part in node.decorator_list)]), node.end_lineno, (module, node.name))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]


def register_both(patch: pytest.MonkeyPatch) -> None:
    """Register the tiny study and its twin."""
    patch.setattr(profiles, "_REGISTRY", profiles._REGISTRY | {"tiny": TINY, "twin": TWIN})


def make_everything(root: pathlib.Path) -> list[Look]:
    """Make every file of the tiny study, and what it needs of its twin, below a folder; return what builders saw."""
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        register_both(patch)
        patch.setenv("EMQ_STUDY_ROOT", str(root))
        _with_small_budgets(patch)
        assert command_line.main(["build", "twin", "proxies.json"]) == 0
        _watch(patch, looks)
        assert command_line.main(["build", "tiny"]) == 0
    return looks


def _with_small_budgets(patch: pytest.MonkeyPatch) -> None:
    short = Settings(iterations=3, activation_iterations=2)
    patch.setattr(adaround, "ITERATIONS", 5)
    patch.setattr(checks, "CONFIGS", 3)
    patch.setattr(checks, "IN_ORDER", 1)
    patch.setattr(checks, "WEIGHTS_ONLY", dataclasses.replace(short, activation_iterations=0))
    patch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in METHODS})
    patch.setattr(methods, "SMALL", dataclasses.replace(methods.SMALL, inputs=("E",), unaries=("no_op", "pow2")))
    patch.setattr(allocation, "FRONT", ())
    patch.setattr(quantization, "BUDGETS", (2.5,))
    patch.setattr(quantization, "TRAINED_BUDGETS", (2.5,))
    patch.setattr(quantization, "TRAINED_METHODS", ("one-layer KL",))
    patch.setattr(runtimes, "ROUNDS", 2)
    for name in set(PROXIES) - {"bit sum", "HAWQ-V2", "one-layer KL", "bit-SNIP, as released"}:
        patch.delitem(PROXIES, name)
    for build, defaults in (
        (quantization.build_comparison, {"settings": short, "seeds": 1, "workers": 1}),
        (evolution.build_evolution, {"workers": 1}),
        (evolution.build_transfer, {"workers": 1}),
    ):
        patch.setattr(build, "__kwdefaults__", build.__kwdefaults__ | defaults)
    for function in vars(intervals).values():
        if inspect.isfunction(function) and "resamples" in (function.__kwdefaults__ or {}):
            patch.setattr(function, "__kwdefaults__", function.__kwdefaults__ | {"resamples": 100})


def _watch(patch: pytest.MonkeyPatch, looks: list[Look]) -> None:
    """Record what every call of a builder looks at."""
    make, get = command_line._make, Profile.__getattribute__

    def watched(study, filename, images):
        before = manifest_of(study)
        images()  # what a data set is made of is settled with the checkpoint
        looks.append(Look())
        sys.setprofile(lambda frame, event, _: event == "call" and looks[-1].codes.add(frame.f_code))
        try:
            make(study, filename, images)
        finally:
            sys.setprofile(None)
        after = manifest_of(study)
        looks[-1].made |= {name for name in after if after[name] != before.get(name)}

    def read(self, name):
        caller = sys._getframe(1).f_code
        checks = caller.co_filename == profiles.__file__ and caller.co_name not in ("rng", "seed_of")
        if looks and get(self, "name") == "tiny" and not checks and caller.co_filename not in _COPIERS:
            looks[-1].fields.add(name)
        return get(self, name)

    patch.setattr(command_line, "_make", watched)
    patch.setattr(Profile, "__getattribute__", read)
    for name, module in list(sys.modules.items()):
        if name.startswith(("book.studies.", "emq_lib.")) and module.__file__ not in _COPIERS:
            for reader in set(READERS) & set(vars(module)):
                patch.setattr(module, reader, _recording(getattr(module, reader), looks))


def _recording(reader, looks: list[Look]):
    def recorded(study, *names, **how):  # a profile, or the folder of a study
        owner = study.name
        if looks:
            looks[-1].files |= {name if owner == TINY.name else f"{owner}/{name}" for name in names if name in FILES}
        return reader(study, *names, **how)

    return recorded
