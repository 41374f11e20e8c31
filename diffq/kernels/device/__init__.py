"""Triton functions, which run on the GPU; in Triton's interpreter on tensors of a CPU."""
