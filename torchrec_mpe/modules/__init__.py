"""Unsharded collections, their quantizers, and the search (arXiv 2409.20305)."""
