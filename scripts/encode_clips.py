"""Encode clips into a latent store; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("encode_clips")
