"""Channels that run through a network: which layers share them, and how to rearrange them."""
