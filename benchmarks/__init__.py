"""Developers' benches and long checks. Run from the project's root: python -m benchmarks.NAME."""
