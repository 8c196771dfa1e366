"""Runs of one recipe over a grid of values and several seeds."""
