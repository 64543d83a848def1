"""Weights on disk: safe writing and interpolation."""
