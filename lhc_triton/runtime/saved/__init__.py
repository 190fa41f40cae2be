"""Accelerated networks in files, read back with every value checked."""
