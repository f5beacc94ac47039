"""Inference in parts and prepared: streams, tiles, plans by memory, packed weights."""
