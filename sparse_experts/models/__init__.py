"""Transformers built from one block, and the one seam under every runner."""
