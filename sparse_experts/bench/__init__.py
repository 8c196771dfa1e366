"""Measurements that compare in one process."""
