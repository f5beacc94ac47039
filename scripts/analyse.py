"""Analyses image autoencoders side by side: latents, feature maps, and quality against resolution; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="analyse"))
