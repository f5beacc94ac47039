"""Encodes and decodes a clip, an image, or a folder of both, and measures PSNR and SSIM; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="reconstruct"))
