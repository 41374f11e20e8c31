"""Levels, records and bytes: the part of diffq that needs NumPy but no torch."""
