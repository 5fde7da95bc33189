"""Hand-designed proxies: one decorated function each, which turns statistics into a score table.

Explained in chapter 02.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from emq_lib.core.checks import real_numbers
from emq_lib.core.errors import InvalidScoreError
from emq_lib.proxies.layer_statistics import SALIENCIES, LayerStatistics
from emq_lib.proxies.released import QE_RATIOS, align
from emq_lib.proxies.scores import is_table

RELEASED = ", as released"


@dataclass(frozen=True)
class Proxy:
    """A hand-designed proxy.

    Attributes:
        name: how tables and figures call it.
        variant: "trivial" (counts bits), "corrected" (the published method, layers aligned with their bits) or
            "as_released" (what the released code computes).
        reads: the statistics whose cost it bears.
        scores: statistics -> score table of shape (S, B), or (L, B) to be summed over the layers of a slot, or matrix
            of shape (S B, S B).
    """

    name: str
    variant: str
    reads: tuple[str, ...]
    scores: Callable[[LayerStatistics], np.ndarray]


PROXIES: dict[str, Proxy] = {}


def proxy(name: str, *, reads: tuple[str, ...] = (), variant: str = "corrected") -> Callable:
    """Register the decorated function as a proxy of that name."""

    def decorate(scores: Callable[[LayerStatistics], np.ndarray]) -> Callable[[LayerStatistics], np.ndarray]:
        PROXIES[name] = Proxy(name, variant, reads, scores)
        return scores

    return decorate


def score_table(name: str, statistics: LayerStatistics) -> np.ndarray:
    """Return a proxy's score table, or its matrix if it has terms for pairs, after checking it.

    Args:
        name: a key of :data:`PROXIES`.
        statistics: of the L layers of S slots at the B choices.

    Returns:
        float64 array of shape (S, B), or (S B, S B).

    Raises:
        InvalidScoreError: unknown proxy, wrong shape, what is no finite real number, or the same score at every width.
    """
    if not isinstance(name, str) or name not in PROXIES:
        raise InvalidScoreError(f"Unknown proxy {name!r}; registered proxies: {', '.join(PROXIES)}.")
    found = real_numbers(PROXIES[name].scores(statistics), f"scores of proxy {name!r}", finite=False)
    layers, slots, choices = len(statistics.names), statistics.slot_count, len(statistics.choices)
    if found.shape not in {(slots, choices), (layers, choices), (slots * choices, slots * choices)}:
        raise InvalidScoreError(
            f"proxy {name!r} returned shape {found.shape}; one row per slot or layer and column per bit is "
            f"{(slots, choices)} or {(layers, choices)}, a matrix of pairs {(slots * choices, slots * choices)}."
        )
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0][0])
        if len(found) == layers:
            layer = statistics.names[row]
        else:
            layer = statistics.slot_names[row if len(found) == slots else row // choices]
        raise InvalidScoreError(f"proxy {name!r} is not finite at layer {layer!r}; look at that layer's statistics.")
    if len(found) == layers != slots:
        found = statistics.per_slot(found)
    if np.ptp(found) == 0 or (is_table(found, statistics.choices) and (found == found[:, :1]).all()):
        raise InvalidScoreError(
            f"proxy {name!r} gives every bit width the same score, so it cannot rank configurations."
        )
    return found


@proxy("bit sum", variant="trivial")
def bit_sum(statistics: LayerStatistics) -> np.ndarray:
    """Sum of the bits: T[s, b] = b."""
    return np.tile(np.array(statistics.choices, dtype=np.float64), (statistics.slot_count, 1))


@proxy("parameter bits", variant="trivial")
def parameter_bits(statistics: LayerStatistics) -> np.ndarray:
    """Bits of all weights: T[l, b] = b P_l, with P_l the number of weights."""
    return statistics.parameters[:, None] * _bits(statistics)


@proxy("BOPs", variant="trivial")
def bops(statistics: LayerStatistics) -> np.ndarray:
    """Bit operations at a fixed activation width: T[l, b] = b MAC_l."""
    return statistics.macs[:, None] * _bits(statistics)


@proxy("HAWQ", reads=("eigenvalue", "errors"))
def hawq(statistics: LayerStatistics) -> np.ndarray:
    """Top Hessian eigenvalue times squared error: T[l, b] = -lambda_l ||E_lb||^2 (Dong et al. 2019)."""
    return -statistics.eigenvalue[:, None] * _squared_error(statistics)


@proxy("HAWQ-V2", reads=("trace", "errors"))
def hawq_v2(statistics: LayerStatistics) -> np.ndarray:
    """Mean Hessian trace times squared error: T[l, b] = -(tr H_l / P_l) ||E_lb||^2 (Dong et al. 2020)."""
    return -(statistics.trace / statistics.parameters)[:, None] * _squared_error(statistics)


@proxy("OMPQ", reads=("similarity",))
def ompq(statistics: LayerStatistics) -> np.ndarray:
    """Orthogonality: T[l, b] = b exp(-gamma_l), gamma_l the CKA of l's output with all others' (Ma et al. 2023)."""
    return np.exp(-statistics.similarity)[:, None] * _bits(statistics)


@proxy("QE")
def quantization_entropy(statistics: LayerStatistics) -> np.ndarray:
    """Quantization entropy: T[l, b] = r_l log(s_8 s_b) (Sun et al. 2022), without looking at the weights.

    s_b is the deviation of a standard normal variable rounded to whole numbers and cut at 2^(b-1); r_l adds the weights
    of the stages that l feeds, 6 for the last, 1 for each of the two before.
    """
    return stage_weights(statistics.stages)[:, None] * _log_gain(statistics.choices)


def stage_weights(stages: np.ndarray) -> np.ndarray:
    """Return what a layer of a stage (0 is the last) adds to the entropies of its own and all later stages."""
    ratios = np.array(QE_RATIOS[::-1])
    return np.cumsum(ratios)[np.minimum(stages, len(ratios) - 1)]


def rounded_normal_std(bits: int) -> float:
    """Return the standard deviation of a standard normal variable rounded to whole numbers, cut at +-2^(bits - 1).

    >>> round(rounded_normal_std(8), 4)
    1.0408
    """
    edge = 2 ** (bits - 1)
    values = np.arange(-edge, edge + 1)
    ends = np.concatenate([[-np.inf], values[:-1] + 0.5, [np.inf]])
    return float(np.sqrt((np.diff(stats.norm.cdf(ends)) * values**2).sum()))


def _log_gain(choices: tuple[int, ...]) -> np.ndarray:
    return np.array([np.log(rounded_normal_std(8) * rounded_normal_std(bits)) for bits in choices])[None]


@proxy("EMQ", reads=("virtual_gradients",))
def emq(statistics: LayerStatistics) -> np.ndarray:
    """EMQ's released formula, aligned: T[l, b] = mean(softmax(log|b VG|)) mean(sqrt(max(b W, 0))) (Dong et al. 2023).

    The softmax runs over output channels, and so its mean is one over their number, whatever the gradient.
    """
    table = []
    for w, v in zip(statistics.weights, statistics.virtual_gradients, strict=True):
        row = []
        for bits in statistics.choices:
            scaled = (bits * v.double()).abs()
            share = scaled.where(scaled > 0, 1.0).log().softmax(dim=0).mean()
            row.append((share * (bits * w.double()).clamp(min=0).sqrt().mean()).item())
        table.append(row)
    return np.array(table)


@proxy("Fisher error", reads=("gradients", "errors"))
def fisher_error(statistics: LayerStatistics) -> np.ndarray:
    """Squared error weighted by the empirical Fisher diagonal: T[l, b] = -sum F_l * E_lb^2 (as in FIT, 2022)."""
    return -statistics.fisher_error


@proxy("relative weight error", reads=("errors",))
def relative_weight_error(statistics: LayerStatistics) -> np.ndarray:
    """Squared error over squared norm: T[l, b] = -||E_lb||^2 / ||W_l||^2."""
    return -_noise_to_signal(statistics)


@proxy("SQNR", reads=("errors",))
def sqnr(statistics: LayerStatistics) -> np.ndarray:
    """Signal to quantization noise in decibels: T[l, b] = 10 log10(||W_l||^2 / ||E_lb||^2)."""
    return -10 * np.log10(_noise_to_signal(statistics))


@proxy("relative output error", reads=("output_error", "errors"))
def relative_output_error(statistics: LayerStatistics) -> np.ndarray:
    """Error of the layer's output over the output: T[l, b] = -||E_lb x||^2 / ||W_l x||^2 on calibration images."""
    return -statistics.output_error


@proxy("one-layer loss", reads=("one_slot", "errors"))
def one_layer_loss(statistics: LayerStatistics) -> np.ndarray:
    """What the cross-entropy gains when one layer alone is quantized: T[s, b] = L - L(s at b bits)."""
    return -statistics.loss


@proxy("one-layer KL", reads=("one_slot", "errors"))
def one_layer_kl(statistics: LayerStatistics) -> np.ndarray:
    """Divergence of the predictions when one layer alone is quantized: T[s, b] = -KL(float || s at b bits)."""
    return -statistics.kl


@proxy("sqrt one-layer KL", reads=("one_slot", "errors"))
def sqrt_one_layer_kl(statistics: LayerStatistics) -> np.ndarray:
    """Square root of the one-layer divergence, which grows like the size of a perturbation and not like its square."""
    return -np.sqrt(statistics.kl.clip(min=0))


@proxy("CLADO", reads=("pair_losses", "errors"))
def clado(statistics: LayerStatistics) -> np.ndarray:
    """Losses of all pairs of layers: M[i, j] = -(L(i, j) - L(i) - L(j) + L) / 2, M[i, i] = L - L(i) (Deng et al. 2023).

    The factor is one half because the sum over pairs meets each of them twice. Not separable.
    """
    losses = statistics.pair_losses
    return -(losses + np.diag(np.diag(losses))) / 2


@proxy("added logit changes", reads=("one_slot", "errors"))
def added_logit_changes(statistics: LayerStatistics) -> np.ndarray:
    """Divergence if the changes of the logits add up: M[i, j] = -mean d_i' S d_j / 2 over images, S = diag(p) - p p'.

    d_i is what quantizing one layer alone does to the logits: the passes of the one-layer KL give all pairs. To second
    order the score is minus the divergence of the predictions from the float ones. Not separable; introduced here.
    """
    return -statistics.logit_products / 2


def bit_weighted(name: str) -> Callable[[LayerStatistics], np.ndarray]:
    """Return the function of a bit-weighted saliency: T[l, b] = b times a number of the layer (Dong et al. 2023)."""

    def scores(statistics: LayerStatistics) -> np.ndarray:
        return statistics.saliencies[name][:, None] * _bits(statistics)

    scores.__doc__ = f"T[l, b] = b {SALIENCIES[name][1]}."
    return scores


for _name, (_reads, _) in SALIENCIES.items():
    proxy(f"bit-{_name}", reads=(_reads,))(bit_weighted(_name))


@proxy("HAWQ" + RELEASED, reads=("released",), variant="as_released")
def hawq_released(statistics: LayerStatistics) -> np.ndarray:
    """Top eigenvalue times bits, no error; the j-th bit meets the convolution after the j-th."""
    return _misaligned(statistics, statistics.released.eigenvalue[1:-1])


@proxy("HAWQ-V2" + RELEASED, reads=("released",), variant="as_released")
def hawq_v2_released(statistics: LayerStatistics) -> np.ndarray:
    """Trace times bits, neither mean nor error; the j-th bit meets the convolution after the j-th."""
    return _misaligned(statistics, statistics.released.trace[1:-1])


@proxy("OMPQ" + RELEASED, reads=("released",), variant="as_released")
def ompq_released(statistics: LayerStatistics) -> np.ndarray:
    """Bits times exp(-gamma), the j-th bit at the j-th convolution, shortcuts counted."""
    return _misaligned(statistics, np.exp(-statistics.released.similarity))


@proxy("QE" + RELEASED, reads=("released",), variant="as_released")
def qe_released(statistics: LayerStatistics) -> np.ndarray:
    """Quantization entropy with the bits counted from the first convolution of the first block."""
    released = statistics.released
    weights = stage_weights(released.stage[released.in_block])
    return align(weights[:, None] * _log_gain(statistics.choices), statistics.slot_count)


@proxy("bit-SNIP" + RELEASED, reads=("released",), variant="as_released")
def bit_snip_released(statistics: LayerStatistics) -> np.ndarray:
    """SNIP of random weights times bits, the j-th bit at the j-th convolution, shortcuts counted."""
    return _misaligned(statistics, statistics.released.snip)


@proxy("bit-Synflow" + RELEASED, reads=("released",), variant="as_released")
def bit_synflow_released(statistics: LayerStatistics) -> np.ndarray:
    """Synflow of weights from N(0, 1) times bits, the j-th bit at the j-th convolution but the last."""
    return _misaligned(statistics, statistics.released.synflow[:-1])


@proxy("EMQ" + RELEASED, reads=("released",), variant="as_released")
def emq_released(statistics: LayerStatistics) -> np.ndarray:
    """The released genotype on random weights, with the list of virtual gradients reversed."""
    released = statistics.released
    return align(released.gradient_branch[::-1] * released.weight_branch, statistics.slot_count)


def _misaligned(statistics: LayerStatistics, values: np.ndarray) -> np.ndarray:
    """Return the table of bits times a list of numbers, paired as zip does."""
    return align(values, statistics.slot_count)[:, None] * np.array(statistics.choices, dtype=np.float64)


def _bits(statistics: LayerStatistics) -> np.ndarray:
    """Return the choices as a row, shape (1, B)."""
    return np.array(statistics.choices, dtype=np.float64)[None]


def _squared_error(statistics: LayerStatistics) -> np.ndarray:
    """Return ||E_lb||^2, shape (L, B)."""
    return np.stack([e.double().square().sum(dim=(1, 2)).numpy() for e in statistics.errors])


def _noise_to_signal(statistics: LayerStatistics) -> np.ndarray:
    """Return ||E_lb||^2 / ||W_l||^2, shape (L, B)."""
    signal = np.array([w.double().square().sum().item() for w in statistics.weights])
    return _squared_error(statistics) / signal[:, None]
