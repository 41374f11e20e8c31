"""Perturbed kernels: other last digits, and nothing else."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
