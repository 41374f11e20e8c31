"""Functions of tensors: grids, sizes, ranges, noise, codebooks. No module, no plan."""
