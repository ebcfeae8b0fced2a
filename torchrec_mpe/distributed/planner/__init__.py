"""Sharding plans that know what mixed precision and caches add to a table and take from it."""
