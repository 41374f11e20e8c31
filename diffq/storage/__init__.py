"""Models to states and files, and back."""
