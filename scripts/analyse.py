"""Analyse image autoencoders side by side: latents, feature maps, and quality against resolution; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("analyse")
