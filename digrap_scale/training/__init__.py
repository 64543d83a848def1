"""Runs: set-up, loop, schedule, log."""
