"""Evaluates autoencoders on clips and images, with a table and a page to look at; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="evaluate"))
