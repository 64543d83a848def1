"""Predictions → accuracy on ID and OOD test sets → tables and pictures."""
