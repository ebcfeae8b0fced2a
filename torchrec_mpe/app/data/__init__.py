"""Prepared training data: read a log once, give its values ids by frequency, and iterate over TorchRec batches."""
