"""Who runs a layer, and with which launch config: timing, measurements kept, tuning, dispatch."""
