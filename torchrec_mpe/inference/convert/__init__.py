"""From a trained checkpoint to packed rows, without a search."""
