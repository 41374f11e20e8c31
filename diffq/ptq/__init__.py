"""Quantization of a state dict without training."""
