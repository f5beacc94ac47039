"""Train a video autoencoder; start it with deepspeed, torchrun or plain python; see --help."""

from leanvae.cli.main import run_program

if __name__ == "__main__":
    run_program("train_video")
