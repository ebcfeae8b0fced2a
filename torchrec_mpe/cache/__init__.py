"""Rows in INT8 or INT4 with a cache of full-precision rows, as a TBE (arXiv 2010.11305)."""
