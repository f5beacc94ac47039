"""Decode a latent store, or single entries, to clips; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("decode_latents")
