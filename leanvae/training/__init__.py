"""Training of the autoencoders."""
