"""Mixtures of experts: their quantized weights in a model of transformers, and how a model multiplies by them."""
