"""The command torchrec-mpe."""
