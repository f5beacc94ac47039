"""Tensor arithmetic shared by the image and the video autoencoder.

Nothing here knows about time, files or processes; those live in ``leanvae``.
"""
