"""Trains a video autoencoder; started by deepspeed, torchrun or plain python; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("train_video")
