"""The benchmark: what a VAE costs at a resolution, ours beside those that a user would pick instead."""
