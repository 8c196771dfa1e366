"""Counting, planning and looking at models."""
