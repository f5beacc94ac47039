"""Decodes a store of latents, or single entries of one, to clips; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="decode_latents"))
