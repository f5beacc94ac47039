"""The configuration of the adversarial loss."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from litevae.config import StrictConfig
from litevae.discriminators import DiscriminatorConfig

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class GANConfig(StrictConfig):
    """The adversarial loss, on single frames.

    Attributes:
        weight: weight of the generator's adversarial loss.
        weighting: `constant`, or `adaptive` (only for the image model): the weight is multiplied by the ratio of the
            reconstruction and adversarial losses' gradient norms at the decoder's last layer (LiteVAE, Equation 2,
            where the weight is 1/2).
        loss: loss of the discriminator.
        generator_loss: `non_saturating`, mean softplus(-logits), or `hinge`, -mean(logits).
        start_step: first step in which the discriminator trains and counts.
        warmup_steps: steps after `start_step` during which the weight rises linearly from 0.
        lecam: weight of the LeCam regularisation of the discriminator.
        lecam_decay: decay of its running averages of the logits.
        learning_rate: rate of the discriminator.
        log_gradient_ratio: whether logged steps measure the gradients' ratio, weight included (LiteVAE, Figure 7).
        discriminator: its architecture.
    """

    weight: NonNegativeFloat = 0.2
    weighting: Literal["constant", "adaptive"] = "constant"
    loss: Literal["hinge", "logistic"] = "hinge"
    generator_loss: Literal["non_saturating", "hinge"] = "non_saturating"
    start_step: NonNegativeInt = 0
    warmup_steps: NonNegativeInt = 0
    lecam: NonNegativeFloat = 0.005
    lecam_decay: Decay = 0.999
    learning_rate: PositiveFloat = 1e-5
    log_gradient_ratio: bool = False
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @property
    def looks_at_gradients(self) -> bool:
        """Whether some steps need the gradients at the decoder's last layer."""
        return self.weighting == "adaptive" or self.log_gradient_ratio


class ImageDiscriminatorConfig(DiscriminatorConfig):
    """`DiscriminatorConfig` with the default of LiteVAE: a UNet."""

    kind: Literal["patch", "unet", "stylegan"] = "unet"


class ImageGANConfig(GANConfig):
    """`GANConfig` with the defaults of LiteVAE."""

    weight: NonNegativeFloat = 0.1
    generator_loss: Literal["non_saturating", "hinge"] = "hinge"
    start_step: NonNegativeInt = 50_000
    lecam: NonNegativeFloat = 0.0
    learning_rate: PositiveFloat = 1e-4
    discriminator: ImageDiscriminatorConfig = ImageDiscriminatorConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
