"""Decoding in batches, and output that resumes."""
