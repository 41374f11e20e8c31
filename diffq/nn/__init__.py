"""Techniques beside weight quantization."""
