"""The quantizers: one face, different ways to train and to store a weight."""
