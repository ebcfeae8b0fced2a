"""Rows packed to exactly their bits: the byte layout, its size, and packing itself."""
