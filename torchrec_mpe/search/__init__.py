"""The search phase: the penalty on bits, and sampling the bit-widths at its end."""

from torchrec_mpe.search.penalty import bit_penalty, search_quantizers
from torchrec_mpe.search.sampling import sample_bits, sample_precision

__all__ = ["bit_penalty", "sample_bits", "sample_precision", "search_quantizers"]
