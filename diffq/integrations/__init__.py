"""Callbacks for trainers, and folders of the hub; each needs its library, when it is imported."""
