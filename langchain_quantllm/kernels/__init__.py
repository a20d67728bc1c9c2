"""Attention over paged keys and values: in Triton, and the same functions in plain torch."""
