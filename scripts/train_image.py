"""Trains an image autoencoder; started by deepspeed, torchrun or plain python; see --help."""

import sys

from leanvae.cli import main

if __name__ == "__main__":
    sys.exit(main(command="train_image"))
