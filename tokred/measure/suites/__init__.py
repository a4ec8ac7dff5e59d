"""Benchmark suites: much measured against each other in one run, as versioned dictionaries."""
