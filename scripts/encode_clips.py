"""Encodes clips into a store of latents; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="encode_clips"))
