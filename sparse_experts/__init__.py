"""Sparse expert models in JAX and Flax: routers, expert layers, recipes."""

__version__ = '0.1.0'
