"""Benchmarks. ``python -m benchmarks.losses`` in a checkout, ``ltkernels bench losses`` anywhere."""
