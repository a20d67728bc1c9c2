"""Fused steps: replacements for parts of a model's forward, verified, and used in the engine's own forwards only."""
