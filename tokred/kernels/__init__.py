"""Loops that are too slow or too many for tensor operations, one backend a file."""
