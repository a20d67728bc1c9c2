"""Computations whose results for a row do not depend on the other rows, bit for bit."""
