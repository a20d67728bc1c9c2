"""Encoders: embedding models, cross-encoders and late-interaction models of sentence-transformers, quantized."""
