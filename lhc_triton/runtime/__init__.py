"""Running, in rooms from the bottom up: op, replay, choosing, network, saved."""
