"""Regressions from bits to measured accuracy: what sums over layers, and sums over pairs of layers, can reach.

Explained in chapter 02.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures

from emq_lib.core.checks import bit_choices, real_numbers, whole_number
from emq_lib.core.costs import choice_indices
from emq_lib.core.errors import InvalidScoreError

_ALPHAS = np.logspace(-3, 3, 25)


@dataclass(frozen=True)
class Oracle:
    """A regression from bits to accuracy, fitted on one half of the configurations.

    Attributes:
        table: score table (S, B); None if the regression has products of layers, which no table holds.
        predictions: its scores of the other half, shape (N,).
        alpha: ridge penalty, chosen by leave-one-out on the first half.
    """

    table: np.ndarray | None
    predictions: np.ndarray
    alpha: float


def additive_oracle(configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]) -> Oracle:
    """Fit ridge regression from one-hot bits to measured accuracy, and predict other configurations.

    It sees accuracies, which no proxy does, so it says what a sum over layers can reach. The penalty is chosen by
    leave-one-out on the configurations it is fitted to; the others are only predicted.

    Args:
        configs: bits to fit on, shape (N, S).
        accuracy: their accuracy, shape (N,).
        others: bits to predict, shape (M, S).
        choices: the B allowed widths.

    Raises:
        ConfigLengthError: the configurations differ in length.
        InvalidBitsError: a width outside the choices.
        InvalidScoreError: the accuracies have another length, are not finite or are all equal.
    """
    fitted, predicted, slots = _design(configs, accuracy, others, choices)
    model = RidgeCV(alphas=_ALPHAS).fit(fitted, accuracy)
    return Oracle(model.coef_.reshape(slots, len(choices)), model.predict(predicted), float(model.alpha_))


def pairwise_oracle(configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]) -> Oracle:
    """Fit ridge regression from one-hot bits and their products over pairs of layers, and predict other configurations.

    It says how much layers interact: what a score beyond a sum over layers can reach with this many measured
    configurations. Arguments, returns and errors are those of :func:`additive_oracle`, but there is no table.
    """
    fitted, predicted, _ = _design(configs, accuracy, others, choices)
    products = PolynomialFeatures(degree=2, interaction_only=True, include_bias=False).fit(fitted)
    model = RidgeCV(alphas=_ALPHAS).fit(products.transform(fitted), accuracy)
    return Oracle(None, model.predict(products.transform(predicted)), float(model.alpha_))


def pair_interactions(
    configs: np.ndarray, accuracy: np.ndarray, choices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate what two layers lose together, beyond the sum of what each loses alone, at the lowest width.

    For every pair of layers the coefficient of "both have the lowest width" in a least-squares regression of accuracy
    on that product and the one-hot bits of all layers. The p-values, of no interaction, use standard errors that allow
    unequal variances (White 1980, with the correction for degrees of freedom).

    Args:
        configs: bits, shape (N, S).
        accuracy: shape (N,).
        choices: the B allowed widths.

    Returns:
        two float64 arrays of shape (S, S), symmetric: the interaction in the unit of the accuracy (diagonal zero), and
        its p-value (diagonal one).

    Raises:
        ConfigLengthError, InvalidBitsError, InvalidScoreError: see :func:`additive_oracle`.
        InvalidScoreError: there are no more configurations than coefficients.
    """
    from statsmodels.regression.linear_model import OLS  # here: it takes a while to import

    one_hot, _, slots = _design(configs, accuracy, configs, choices)
    basis = linalg.orth(one_hot)  # the constant is among its span: one-hot bits of a layer sum to one
    if len(one_hot) <= basis.shape[1] + 1:
        raise InvalidScoreError(f"{len(one_hot)} configurations are too few for {basis.shape[1] + 1} coefficients.")
    lowest = one_hot[:, :: len(choices)]
    effects, p_values = np.zeros((slots, slots)), np.ones((slots, slots))
    for pair in itertools.combinations(range(slots), 2):
        product = lowest[:, pair].prod(axis=1)
        product = product - basis @ (basis.T @ product)  # the same coefficient, and zero where the pair never meets
        if product @ product > 1e-9:
            fit = OLS(accuracy, np.column_stack([basis, product])).fit(cov_type="HC1", use_t=True)
            effects[pair] = effects[pair[::-1]] = fit.params[-1]
            p_values[pair] = p_values[pair[::-1]] = fit.pvalues[-1]
    return effects, p_values


def resample_layers(table: np.ndarray, slots: int) -> np.ndarray:
    """Return a score table for a network of another depth, by linear interpolation over the relative depth.

    Slot s of S stands at (s + 1/2) / S. Beyond the first and the last slot the table stays as it is there.

    Args:
        table: shape (S, B).
        slots: number of slots of the other network.

    Returns:
        float64 array of shape (slots, B).

    Raises:
        InvalidScoreError: the table is none of finite real numbers.
        InvalidParameterError: the number of slots is not one.

    >>> resample_layers(np.array([[0.0, 1.0], [4.0, 3.0]]), 4)
    array([[0. , 1. ],
           [1. , 1.5],
           [3. , 2.5],
           [4. , 3. ]])
    """
    table, slots = real_numbers(table, "scores", ndim=2), whole_number(slots, "the number of slots", 1)
    if not table.size:
        raise InvalidScoreError(f"a score table needs one slot and one choice or more, got shape {table.shape}.")
    places, wanted = ((np.arange(count) + 0.5) / count for count in (len(table), slots))
    return np.stack([np.interp(wanted, places, column) for column in table.T], axis=1)


def _design(
    configs: np.ndarray, accuracy: np.ndarray, others: np.ndarray, choices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return both halves one-hot, shapes (N, S B) and (M, S B), and S."""
    choices, accuracy = bit_choices(choices), real_numbers(accuracy, "accuracies", ndim=1)
    slots = np.shape(np.atleast_2d(configs))[1]
    indices = [choice_indices(bits, choices, slots) for bits in (configs, others)]
    if len(accuracy) != len(indices[0]) or not np.ptp(accuracy) > 0:
        raise InvalidScoreError(
            f"accuracies {accuracy.shape} must not be all equal, one for each of {len(indices[0])} configs."
        )
    one_hot = np.eye(len(choices))
    fitted, predicted = (one_hot[rows].reshape(-1, slots * len(choices)) for rows in indices)
    return fitted, predicted, slots
