"""What follows from times that were taken: medians with quartiles, ratios, the floor. No torch in here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Passes of a matrix the size of the logits through memory: read the logits for the statistics, read them again for the
# gradient, write it. With a second model its logits are read as often.
PASSES = 3
PASSES_WITH_TEACHER = 5
# A copy reads one such matrix and writes one.
COPY_PASSES = 2


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile (inclusive method) and number of the values."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "runs": len(values)}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "runs": len(values)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """value: ratio of the medians; q1, q3: quartiles of the ratios of runs that followed each other."""
    pairs = summary([above / below for above, below in zip(numerator, denominator, strict=True)])
    value = statistics.median(numerator) / statistics.median(denominator)
    return {"value": value, "q1": pairs["q1"], "q3": pairs["q3"]}


def bandwidth(matrix_bytes: int, copy_seconds: Sequence[float]) -> float:
    """Bytes per second of the copies of a matrix: 2 matrix_bytes / median(copy_seconds)."""
    return COPY_PASSES * matrix_bytes / statistics.median(copy_seconds)


def floor_seconds(passes: int, matrix_bytes: int, copy_seconds: Sequence[float]) -> float:
    """Seconds that moving the bytes alone takes: passes * matrix_bytes / bandwidth."""
    return passes * matrix_bytes / bandwidth(matrix_bytes, copy_seconds)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of the relative deviations: (fixed, slope, largest deviation) of y = fixed + slope * x.

    The deviation is relative to y.
    """
    weights = [1 / value**2 for value in y]
    total = sum(weights)
    mean_x = sum(w * value for w, value in zip(weights, x, strict=True)) / total
    mean_y = sum(w * value for w, value in zip(weights, y, strict=True)) / total
    slope = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    slope /= sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    fixed = mean_y - slope * mean_x
    return fixed, slope, max(abs(fixed + slope * a - b) / b for a, b in zip(x, y, strict=True))
