"""Search, retrain and emit as a job of many ranks, and the torchx components that launch it."""
