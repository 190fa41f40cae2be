"""Plans: which filters run together, on which backend, and why. Pure Python and numpy."""
