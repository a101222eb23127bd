"""Models: the contract of trunks, heads and stages, the native trunk, and weights by name."""
