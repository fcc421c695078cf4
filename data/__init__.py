"""Data: what the pictures are, in which order they come, and how they are varied."""
