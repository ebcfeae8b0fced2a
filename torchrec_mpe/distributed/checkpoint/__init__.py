"""Checkpoints of training in every phase."""
