"""Measuring models: memory, speed, and what a scheme costs in quality. Nothing here prints; the command line does."""
