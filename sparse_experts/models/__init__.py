"""Transformers built from one block, and `Objective`, which all runners use."""
