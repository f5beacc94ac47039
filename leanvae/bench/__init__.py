"""The benchmark: the cost of a VAE at a resolution, ours beside their alternatives."""
