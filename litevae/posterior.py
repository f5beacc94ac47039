"""The diagonal Gaussian that an encoder's output describes."""

import torch
from torch import Tensor

_LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """A normal distribution over latents with independent elements (Kingma and Welling, 2014).

    Attributes:
        mean: `(B, Z, ...)`.
        logvar: natural logarithm of the variance, clamped to [-30, 20]; shape, dtype and device of `mean`.
        size: true size of the encoded pixels, `(H, W)` or `(T, H, W)`, which a decoder crops to; None if unknown.
    """

    def __init__(self, mean: Tensor, logvar: Tensor, size: tuple[int, ...] | None = None) -> None:
        """Clamp the log-variance, which gets no gradient outside the range.

        Args:
            mean: `(B, Z, ...)`.
            logvar: natural logarithm of the variance, in the shape of `mean`.
            size: true size of the encoded pixels.

        Raises:
            ValueError: the two shapes differ.
        """
        if mean.shape != logvar.shape:
            raise ValueError(f"logvar has shape {tuple(logvar.shape)}: expected that of mean, {tuple(mean.shape)}")
        self.mean = mean
        self.size = size
        self.logvar = logvar.clamp(*_LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        """Standard deviation, in the shape of `mean`."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """Return the most likely latent, which is the mean: `(B, Z, ...)`."""
        return self.mean

    def sample_with(self, noise: Tensor) -> Tensor:
        """Return a reparametrised sample `mean + std * noise`, differentiable in both parameters.

        Args:
            noise: standard normal, in the shape of `mean`; cast to its dtype and device.

        Raises:
            ValueError: the shape is not that of `mean`.
        """
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}: expected that of mean, {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a reparametrised sample with noise from `generator`, or from the global one of the latent's device.

        The noise is drawn on the generator's device and in float32 at least, so that a CPU generator gives the same
        noise for latents on any device and in any precision.
        """
        noise = torch.randn(
            self.mean.shape,
            generator=generator,
            device=self.mean.device if generator is None else generator.device,
            dtype=torch.promote_types(self.mean.dtype, torch.float32),
        )
        return self.sample_with(noise)

    def kl(self) -> Tensor:
        """Compute the divergence from the standard normal, KL(N(mean, var) || N(0, 1)), of each sample.

        Returns:
            `(B,)` in nats: half the sum over all but the batch of `mean^2 + var - 1 - logvar`
            (Kingma and Welling, 2014, appendix B); float32 at least.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(1)
