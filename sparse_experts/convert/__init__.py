"""Checkpoints of T5X and Hugging Face, in and out: docs/checkpoints.md."""

from sparse_experts.convert.conversion import convert, load

__all__ = ['convert', 'load']
