"""A packed model over the devices of one host."""
