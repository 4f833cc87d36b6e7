"""Measurements, apart from the tests: run with ``python -m benchmarks.NAME`` from a checkout."""
