"""Runs of one recipe over a grid of values and seeds, and runs side by side."""
