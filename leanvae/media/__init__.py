"""Clips and images in files: found, read, decoded in processes and written. Nothing here imports torch."""
