"""One click model trained by every method."""
