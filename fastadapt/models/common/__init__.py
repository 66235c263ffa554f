"""What the methods share: their base classes, losses, heads, frozen towers, parity options and parameter tables."""
