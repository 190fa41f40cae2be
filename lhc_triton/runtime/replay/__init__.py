"""Calls of a network recorded and replayed, so that Python costs nothing between its layers."""
