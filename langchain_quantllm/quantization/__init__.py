"""Making quantized checkpoints: calibration texts, GPTQ, and what is written down of it."""
