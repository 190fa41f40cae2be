"""Running: packing, the one op, its backends, and whole networks."""
