"""Dispatchers execute an assignment and do not know who made it."""
