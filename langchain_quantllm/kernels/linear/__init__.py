"""Linear layers with quantized weights: Triton and CPU kernels, and the same functions in plain torch."""
