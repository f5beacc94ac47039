"""Inference in parts, and on prepared weights: streams, tiles, plans by memory."""
