"""Weights that stay small in memory, and are decoded when a layer reads them."""
