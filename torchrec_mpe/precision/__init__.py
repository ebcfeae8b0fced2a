"""Precision plans: one bit-width per row, searched or straight from frequencies."""

from torchrec_mpe.precision.from_frequencies import cut_precision, precision_from_frequencies, uniform_precision
from torchrec_mpe.precision.plan import PrecisionPlan

__all__ = ["PrecisionPlan", "cut_precision", "precision_from_frequencies", "uniform_precision"]
