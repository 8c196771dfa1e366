"""Checkpoints of other models, made from given ones."""
