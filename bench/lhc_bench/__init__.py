"""Benchmarks: cases, dense peers, rows and plots."""
