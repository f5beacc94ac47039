"""Measures what VAEs cost at a resolution, ours and others; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="bench_res"))
