"""Encode and decode a clip, an image, or a folder of both, and measure PSNR and SSIM; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("reconstruct")
