"""Held-out losses, tasks' metrics, calibration."""
