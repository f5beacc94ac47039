"""Clips and images for training: sources, the order of an epoch, decoding, and the loader."""
