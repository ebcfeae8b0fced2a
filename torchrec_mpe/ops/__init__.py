"""Ops with one definition and several backends; they know tensors and packed buffers only."""
