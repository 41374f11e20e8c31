"""Product quantization: blocks, codebooks, noise on blocks, stages."""
