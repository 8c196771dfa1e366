"""Routers decide which tokens meet which experts; one file each."""
