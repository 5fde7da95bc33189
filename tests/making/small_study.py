"""Runs first in the kernels of the tests: a study of the digits just large enough that every step has something to do.

The published study of that name stays as it is; its files are compared with their hashes by other tests.
"""


def make_small() -> None:
    """Replace the digits' profile, and let its steps do less, in this process alone."""
    import functools
    import inspect
    from dataclasses import replace

    from book.studies import checks, evolution, quantization
    from emq_lib.core.profiles import EvolutionBudget, get_profile, register
    from emq_lib.proxies import intervals
    from emq_lib.quantization import adaround
    from emq_lib.quantization.brecq import Settings

    budget = EvolutionBudget(population=20, iterations=20, seeds=2)
    counts = {"bench_configs": 160, "stratified_configs": 110, "one_bit_configs": 60}
    register(replace(get_profile("digits-resnet8"), evolution=budget, **counts))
    checks.CONFIGS, checks.IN_ORDER, checks.WEIGHTS_ONLY = 30, 6, Settings(iterations=20, activation_iterations=0)
    adaround.ITERATIONS = 50
    for _, function in inspect.getmembers(intervals, inspect.isfunction):
        if "resamples" in (function.__kwdefaults__ or {}):
            function.__kwdefaults__["resamples"] = 200
    for name in ("build_evolution", "build_transfer"):
        setattr(evolution, name, functools.partial(getattr(evolution, name), workers=1))
    compare, settings = quantization.build_comparison, Settings(iterations=20, activation_iterations=10)

    def build_comparison(*args: object, **choices: object) -> None:
        compare(*args, **choices | {"settings": settings, "epochs": 1, "seeds": 2, "workers": 1})

    quantization.build_comparison = build_comparison


make_small()
del make_small
