"""The version, which results and caches name: a file of its own, so that every room may read it."""

__version__ = "0.10.0"
