"""The last stage: quantize any network by a plan; allocate bits by every score table, and measure what they buy.

Explained in chapters 04 and 05.
"""

from __future__ import annotations

import copy
import pathlib
import time
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from book.studies.evolution import SEARCHED
from book.studies.rows import PARTIAL, load_network, measure_resumably
from book.studies.study import checked_path, record, sole_writer, study_folder
from emq_lib.allocation import Allocation, allocate, budget_for_average_bits
from emq_lib.approximate import allocate_locally, random_within
from emq_lib.bench.table import Bench
from emq_lib.block_reconstruction import PAPER, Settings, reconstruct_in_order
from emq_lib.core.bank import WeightBank
from emq_lib.core.configs import bits_text
from emq_lib.core.costs import CostTable, bops_cost, size_cost
from emq_lib.core.datasets import ImageData, Inputs, Split
from emq_lib.core.errors import InvalidParameterError, UnsupportedModelError
from emq_lib.core.files import atomic_path
from emq_lib.core.graphs import fold_batchnorm
from emq_lib.core.networks import QuantizedNetwork
from emq_lib.core.profiles import Profile
from emq_lib.core.quantizers import choose_activation_ranges, quantize
from emq_lib.planning import plan_bits
from emq_lib.proxies.passes import divergences, one_slot_logits
from emq_lib.proxies.scores import score
from emq_lib.qat import QAT, QatRecipe, train_quantized
from emq_lib.reconstruction import adaround, second_moments

METHODS = ("rtn", "adaround", "brecq", "qat")
FRONT = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
FRONT_METHODS = ("bit sum", "HAWQ-V2", "sqrt one-layer KL", "evolved", "evolved for rho", "evolved for allocation")
RANDOM_DRAWS = 5
PATIENCE, TOLERANCE = 20.0, 1e-5  # seconds for a proof; without one, the share of the regret that may be left


def quantize_model(
    model: nn.Module,
    calibration: torch.Tensor | Split,
    *,
    bits: Mapping[str, int] | None = None,
    default: int = 3,
    ends: int | None = 8,
    activation_bits: int = 8,
    method: str = "rtn",
    settings: Settings = PAPER,
    training: Split | None = None,
    recipe: QatRecipe = QAT,
    resume: pathlib.Path | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> QuantizedNetwork:
    """Quantize any network of convolutions and linear layers; the plan is printed before it runs.

    Args:
        model: the float network, which `torch.fx` can trace; it stays as it is.
        calibration: images for the ranges of activations and for learned rounding: float inputs of shape (N, C, H, W)
            as the network takes them, or a split.
        bits: pattern over layer names -> width, see :func:`emq_lib.planning.plan_bits`.
        default: width of the other layers.
        ends: width of the first and the last layer where no pattern matches them; None: like the others.
        activation_bits: width of every quantized layer's input.
        method: "rtn": to nearest, with range search. "adaround": each layer's directions of rounding learned on float
            inputs. "brecq": block after block, on the inputs that the quantized blocks before give, then the steps of
            the activations. "qat": the whole network trained while it is rounded, with learned steps.
        settings: of "brecq": the paper's, or :data:`emq_lib.block_reconstruction.LAPTOP` for minutes without a GPU.
        training: images and labels that "qat" trains on.
        recipe: of "qat".
        resume: file that takes the state of "qat" after every epoch: an interrupted call goes on from there.
        seed: of the batches of "brecq" and "qat".
        verbose: print the plan.

    Returns:
        The quantized network, in evaluation mode. Layers that cannot be quantized stay in floating point; the plan
        names them, and so does a warning.

    Raises:
        InvalidParameterError: an unknown method, "qat" without training images, patterns that match nothing or twice,
            calibration images of the wrong shape or with NaN.
        InvalidBitsError: a width outside 1 to 8.
        UnsupportedModelError: the network cannot be traced, or runs a layer twice.
    """
    if method not in METHODS:
        raise InvalidParameterError(f"unknown method {method!r}; there are {', '.join(METHODS)}.")
    if method == "qat" and training is None:
        raise InvalidParameterError('"qat" trains the network: pass the images and labels as training=Split(...).')
    folded, images, example = _prepared(model, calibration)
    plan = plan_bits(folded, example, bits=bits, default=default, ends=ends, activation_bits=activation_bits)
    if verbose:
        print(plan)
    if plan.kept:
        warnings.warn(f"left in floating point: {', '.join(name for name, _ in plan.kept)}", stacklevel=2)
    layers = plan.layers.assign(searchable=True, slot=range(len(plan.layers)))
    ranges = choose_activation_ranges(folded, layers, images, bits=activation_bits)
    config, generator = tuple(plan.bits.values()), torch.Generator().manual_seed(seed)
    if method == "qat":
        return train_quantized(
            folded, layers, config, training, ranges, generator=generator, recipe=recipe, resume=resume
        )
    if method == "brecq":
        return reconstruct_in_order(folded, layers, config, images, ranges, generator=generator, settings=settings)
    original = {name: folded.get_submodule(name).weight for name in plan.bits}
    if method == "rtn":
        weights = {name: quantize(original[name], width) for name, width in plan.bits.items()}
    else:
        moments = second_moments(folded, list(plan.bits), images)
        weights = {name: adaround(original[name], width, moments[name]) for name, width in plan.bits.items()}
    return QuantizedNetwork(folded, WeightBank.of(weights), ranges)


def choose_bits(
    model: nn.Module,
    calibration: torch.Tensor | Split,
    *,
    average_bits: float,
    choices: Sequence[int] = (2, 3, 4),
    ends: int | None = 8,
) -> dict[str, int]:
    """Choose each layer's bits without training: what its divergence alone says, allocated exactly within a size.

    Every layer in turn is rounded to nearest at every width, and the divergence of the network's predictions from the
    float ones is its score (the one-layer KL of chapter 02); their sum is minimised within the packed size (chapter
    04). Takes a pass over the images for each layer and width.

    Args:
        model: the float network, which `torch.fx` can trace; it stays as it is.
        calibration: a few hundred images, as for :func:`quantize_model`; labels are not needed.
        average_bits: the size, as average bits of the weights between the ends.
        choices: the widths to choose from, increasing.
        ends: width that :func:`quantize_model` is to give to the first and the last layer; None: they take part.

    Returns:
        layer name -> bits, as `bits=` of :func:`quantize_model` takes it; without the ends.

    Raises:
        InvalidParameterError, UnsupportedModelError: see :func:`quantize_model`.
        InfeasibleBudgetError: fewer bits than the smallest choice.
    """
    folded, images, example = _prepared(model, calibration)
    table = plan_bits(folded, example, default=max(choices), ends=ends).layers
    free = table["rule"] != "ends"
    names = list(table.loc[free, "name"])
    layers = table.assign(searchable=free, slot=free.cumsum() - 1, pinned_bits=table["bits"])
    size = size_cost(layers, choices)
    budget = budget_for_average_bits(average_bits, size, choices)
    weights = {name: folded.get_submodule(name).weight for name in names}
    rounded = {name: [quantize(weight, width).dequantize() for width in choices] for name, weight in weights.items()}
    scores = -divergences(*one_slot_logits(folded, [(name,) for name in names], rounded, images))
    found = allocate(scores, {"size": size}, {"size": budget}, choices, layers=names, time_limit=PATIENCE)
    return dict(zip(names, found.bits, strict=True))


def _prepared(
    model: nn.Module, calibration: torch.Tensor | Split
) -> tuple[torch.fx.GraphModule, Split | Inputs, torch.Tensor]:
    """Return a folded copy of the network, its calibration images, and one input that it takes."""
    images = calibration if isinstance(calibration, Split) else Inputs(calibration)
    folded = _traced(model)
    return folded, images, _example(folded, images)


def _traced(model: nn.Module) -> torch.fx.GraphModule:
    """Return a folded copy."""
    try:
        return fold_batchnorm(copy.deepcopy(model))
    except (torch.fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedModelError(
            f"torch.fx cannot trace the network ({error}). Control flow that depends on values has to go."
        ) from error


def _example(folded: nn.Module, images: Split | Inputs) -> torch.Tensor:
    """Return one input after checking that all are finite and that the network takes them."""
    if not len(images) or not torch.isfinite(images.inputs()).all():
        raise InvalidParameterError("The calibration images must be one or more, and hold no NaN or infinity.")
    example = images[:1].inputs()
    try:
        with torch.inference_mode():
            folded(example)
    except RuntimeError as error:
        raise InvalidParameterError(
            f"The network does not take calibration images of shape {tuple(example.shape[1:])} ({error})."
        ) from error
    return example


def choose_configurations(profile: Profile, tables: Mapping[str, Mapping], size: CostTable) -> pd.DataFrame:
    """Allocate bits at every budget by every method's scores, and draw random configurations of the same sizes.

    Sums over slots are allocated exactly, other scores by local search.

    Args:
        profile: gives the budgets (average bits) and the choices.
        tables: method -> entry as of :func:`book.studies.heldout.load_tables`.
        size: packed size of a configuration.

    Returns:
        columns proxy, variant, average_bits, budget_bytes, seed, bits (text), seconds; one row per choice.
    """
    rows = []
    for average in sorted({*profile.budgets, *FRONT}):
        budget = budget_for_average_bits(average, size, profile.choices)
        shared = {"average_bits": average, "budget_bytes": int(budget)}
        for name, entry in tables.items():
            if average not in profile.budgets and name not in FRONT_METHODS:
                continue
            started = time.perf_counter()
            best = _allocate(entry, size, budget, profile, rng=profile.rng(f"{name} at {average}"))
            seconds = entry["seconds"] + time.perf_counter() - started
            row = {
                "proxy": name,
                "variant": entry["variant"],
                "seed": 0,
                "bits": bits_text(best.bits),
                "seconds": seconds,
            }
            rows.append(shared | row)
        rng = profile.rng(f"random at {average}")
        for seed in range(RANDOM_DRAWS):
            drawn = bits_text(random_within(size, budget, profile.choices, rng=rng))
            rows.append(shared | {"proxy": "random", "variant": "trivial", "seed": seed, "bits": drawn, "seconds": 0.0})
    return pd.DataFrame(rows)


def _allocate(
    entry: Mapping, size: CostTable, budget: float, profile: Profile, *, rng: np.random.Generator
) -> Allocation:
    """Allocate by one method's scores within a size."""
    costs, budgets, choices = {"size": size}, {"size": budget}, profile.choices
    if entry["separable"]:
        found = allocate(entry["table"], costs, budgets, choices, time_limit=PATIENCE)
        return found if found.optimal else allocate(entry["table"], costs, budgets, choices, tolerance=TOLERANCE)

    def scored(configs: np.ndarray) -> np.ndarray:
        return score(entry["table"], configs, choices, aggregation=entry["aggregation"])

    return allocate_locally(scored, costs, budgets, choices, rng=rng)


def build_quantization(profile: Profile, data: ImageData, tables: Mapping[str, Mapping]) -> None:
    """Choose configurations, measure each on the test images of the bench, and write ``quantization.csv``.

    Can be interrupted and called again: see :func:`book.studies.rows.measure_resumably`.

    Args:
        profile: the study; checkpoint and bench must exist.
        data: its images.
        tables: as for :func:`choose_configurations`.
    """
    with sole_writer(profile):
        network, layers = load_network(profile, data)
        size = size_cost(layers, profile.choices)
        bit_operations = bops_cost(layers, profile.choices, activation_bits=profile.activation_bits)
        uniform = Bench.load(profile).select("uniform").table
        chosen = choose_configurations(profile, tables, size)
        flat = [
            {
                "proxy": "uniform",
                "variant": "trivial",
                "average_bits": float(row.bits[0]),
                "budget_bytes": row.size_bytes,
                "seed": 0,
                "bits": bits_text(row.bits),
                "seconds": 0.0,
            }
            for row in uniform.itertuples()
        ]
        chosen = pd.concat([pd.DataFrame(flat), chosen], ignore_index=True)
        distinct = chosen["bits"].drop_duplicates()
        configs = np.array([[int(bits) for bits in text] for text in distinct], dtype=np.int8)
        measured, seconds = measure_resumably(profile, network, data, configs, images=profile.bench_images)
        measured = measured.drop(columns="key").assign(
            bits=distinct.to_numpy(),
            size_bytes=size.total(configs, profile.choices).astype(np.int64),
            bops=bit_operations.total(configs, profile.choices).astype(np.int64),
            activation_bits=profile.activation_bits,
            quantizer=profile.quantizer,
        )
        table = chosen.merge(measured, on="bits", how="left", validate="many_to_one")
        with atomic_path(study_folder(profile) / "quantization.csv") as path:
            table.to_csv(path, index=False)
        command = f"emq_lib.quantization.build_quantization on {profile.name}"
        record(profile, "quantization.csv", command=command, seconds=seconds, rows=len(table))
        (study_folder(profile) / PARTIAL).unlink(missing_ok=True)


def load_quantization(profile: Profile) -> pd.DataFrame:
    """Return what each method chose at each budget, with its measured accuracy; `bits` is text."""
    table = _load(profile)
    return table[table["variant"] != SEARCHED].reset_index(drop=True)


def load_search_choices(profile: Profile) -> pd.DataFrame:
    """Return what the formula of each search chose, as :func:`load_quantization`, with the search's method and seed."""
    table = _load(profile)
    table = table[table["variant"] == SEARCHED].reset_index(drop=True)
    table[["method", "seed"]] = table["proxy"].str.rsplit(", ", n=1).to_list()
    return table.astype({"seed": int})


def _load(profile: Profile) -> pd.DataFrame:
    table = pd.read_csv(checked_path(profile, "quantization.csv"), dtype={"bits": str})
    return table.assign(half_b=100 * table["correct_b"] / table["n_b"])
