"""Train a tiny video diffusion transformer from diffusers on a latent store, and decode a sample.

    python docs/examples/video_diffusion.py --store STORE --checkpoint CHECKPOINT --output sample.mp4

It shows how the parts fit together; a model of this size learns little. The flow is a straight line from latents to
noise (Lipman et al., 2023), and the transformer predicts its velocity. Needs leanvae[latents,diffusers].
"""

import argparse
from fractions import Fraction
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from leanvae import load_vae
from leanvae.diffusers import AutoencoderKLLeanVAE
from leanvae.latents import LatentClips, ShapeBatches
from leanvae.media.writer import VideoWriter
from litevae.pixels import to_bytes

from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel  # isort: skip - after leanvae.diffusers

TEXT_CHANNELS = 32  # for captions, which this example leaves out


def make_transformer(channels: int) -> WanTransformer3DModel:
    """Make a Wan transformer with about 200k parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_CHANNELS,
        freq_dim=64,
        ffn_dim=192,
        num_layers=2,
        rope_max_seq_len=64,
    )


def predict(transformer: WanTransformer3DModel, z: Tensor, timestep: Tensor) -> Tensor:
    """Predict the flow's velocity at noisy latents `(B, Z, T', H', W')` and times (B,) in [0, 1000]."""
    text = z.new_zeros(len(z), 1, TEXT_CHANNELS)
    return transformer(z, timestep, text, return_dict=False)[0]


def train(transformer: WanTransformer3DModel, loader: DataLoader, num_steps: int) -> list[float]:
    """Train for `num_steps` steps; return the losses."""
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    losses = []
    for _, batch in zip(range(num_steps), cycle(loader), strict=False):
        z = batch["latent"]
        noise, time = torch.randn_like(z), torch.rand(len(z))
        mixed = torch.lerp(z, noise, time.view(-1, 1, 1, 1, 1))
        loss = F.mse_loss(predict(transformer, mixed, 1000 * time), noise - z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def sample(transformer: WanTransformer3DModel, shape: tuple[int, ...], num_steps: int) -> Tensor:
    """Draw normalized latents of a shape `(Z, T', H', W')`."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    z = torch.randn(1, *shape)
    for timestep in scheduler.timesteps:
        z = scheduler.step(predict(transformer, z, timestep[None]), timestep, z, return_dict=False)[0]
    return z


def main() -> None:
    """Train, sample and decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="a store written by leanvae encode_clips")
    parser.add_argument("--checkpoint", required=True, help="the checkpoint that it was encoded with")
    parser.add_argument("--output", required=True, help="mp4 file for the sample")
    parser.add_argument("--steps", type=int, default=200, help="training steps; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=4, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)

    clips = LatentClips(args.store, normalize=True)
    loader = DataLoader(clips, batch_sampler=ShapeBatches(clips, args.batch_size))
    shape = clips.shapes[0]
    transformer = make_transformer(shape[0])
    losses = train(transformer, loader, args.steps)
    tenth = max(1, len(losses) // 10)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at the start, {sum(losses[-tenth:]) / tenth:.3f} at the end")

    vae = AutoencoderKLLeanVAE.from_leanvae(load_vae(args.checkpoint))
    mean, std = (torch.tensor(clips.statistics[name]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        frames = vae.decode(sample(transformer.eval(), shape, num_steps=20) * std + mean).sample[0].transpose(0, 1)
    images = to_bytes(((frames + 1) / 2).clamp(0, 1))
    rate = Fraction(clips[0]["fps"] or 25).limit_denominator(1001)
    with VideoWriter(args.output, images.shape[2], images.shape[1], time_base=1 / rate, rate=rate) as writer:
        for image in images:
            writer.write(image)
    print(f"{args.output}: a sample of {len(images)} frames of {images.shape[2]}x{images.shape[1]}")


if __name__ == "__main__":
    main()
