"""Evaluate autoencoders on clips and images, with a table and a page to look at; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("evaluate")
