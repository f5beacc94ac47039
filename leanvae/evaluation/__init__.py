"""Evaluation: autoencoders on a user's clips and images, in numbers and as a page."""
