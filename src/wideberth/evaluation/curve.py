"""Robust accuracy as a function of the radius, from each sample's smallest radius."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import beta

from wideberth.checks import InputError
from wideberth.verification import TOLERANCE


def accuracy_curve(
    samples: pd.DataFrame, radii: Sequence[float] | NDArray[np.floating], confidence: float = 0.95
) -> pd.DataFrame:
    """Robust accuracy at each of these radii, with its exact binomial band.

    The accuracy at e is the share of samples whose smallest radius lies beyond e (by more than the slack with which a
    verdict is verified, so that curve and verdict agree at the verdict's own eps). It is an upper bound, like every
    verdict, and never rises with e: nor do the ends of the band.

    Args:
        samples: one row per sample, with a column `radius`: the smallest known at which it breaks, in units of the
            input; 0 where it is misclassified as it is, inf where it was broken at no distance.
        radii: (E,) finite and not negative, in any order.
        confidence: of the Clopper-Pearson interval at each radius by itself, in (0, 1); not of the band as a whole.

    Returns:
        One row per radius, in the order given: eps, and accuracy, low and high in [0, 1].

    Raises:
        InputError: where there is no such column, or no sample, or a value is out of its range.
    """
    if "radius" not in samples:
        raise InputError("samples: hold no column 'radius'; evaluate with radii=True")
    found, asked = samples["radius"].to_numpy(float), np.asarray(radii, dtype=float)
    if not len(found):
        raise InputError("samples: hold no rows, and there is no share of none")
    if not (found >= 0).all():
        raise InputError("samples: column 'radius' holds negative or missing values; must be from 0 to inf")
    if asked.ndim != 1 or not ((asked >= 0) & (asked < np.inf)).all():
        raise InputError("radii: must be a list of finite numbers, none of them negative")
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence!r}: must lie between 0 and 1")
    n = len(found)
    left = n - np.searchsorted(np.sort(found), asked * (1 + TOLERANCE), side="right")
    tail = (1 - confidence) / 2
    # At either end a parameter of the beta distribution is 0, where its quantile is no number.
    low = np.where(left > 0, beta.ppf(tail, np.maximum(left, 1), n - left + 1), 0.0)
    high = np.where(left < n, beta.ppf(1 - tail, left + 1, np.maximum(n - left, 1)), 1.0)
    return pd.DataFrame({"eps": asked, "accuracy": left / n, "low": low, "high": high})
