"""Measure the cost of VAEs at a resolution, ours and others; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("bench_res")
