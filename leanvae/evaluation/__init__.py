"""Evaluation: what autoencoders make of a user's clips and images, in numbers and as a page to look at."""
