"""Quantized and merged checkpoints: calibration, GPTQ, bitsandbytes, adapters, GGUF."""
