"""The one op: packing, epilogue, and the backends that need no kernel of ours."""
