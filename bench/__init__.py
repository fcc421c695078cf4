"""Measurements and proofs: what the trainer claims, run on your machine."""
