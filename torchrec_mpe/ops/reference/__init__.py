"""The definitions of the ops, in pure PyTorch."""
