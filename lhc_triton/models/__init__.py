"""Networks to convert and train."""
