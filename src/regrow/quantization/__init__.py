"""Storage formats of weights, named quantization schemes, and the grids of quantized values."""
