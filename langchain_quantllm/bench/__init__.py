"""Benches of models in their schemes: memory, speed, training and quality. Prints nothing; the command line does."""
