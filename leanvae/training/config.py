"""Configuration of a training run: one YAML file."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from leanvae.config import ConfigError, LeanVAEConfig
from leanvae.data.config import DataConfig
from litevae.config import StrictConfig
from litevae.discriminators import DiscriminatorConfig

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]

# What DeepSpeed also wants to be told, and the field of ours that tells it.
_KEYS_OF_OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
}
# The other top-level keys of DeepSpeed's configuration; it takes unknown ones for nothing, which hides misspelt ones.
_DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_types disable_allgather dump_state elasticity flops_profiler gradient_predivide_factor
    memory_breakdown prescale_gradients seq_parallel_communication_data_type sparse_gradients steps_per_print
    tensorboard timers torch_autocast wall_clock_breakdown wandb zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()
)


class LossConfig(StrictConfig):
    """Weights of the reconstruction losses, for pixels in [-1, 1].

    The defaults are the published recipe's, whose data are in [-0.5, 0.5], rescaled.

    Attributes:
        l1: mean absolute error of pixels.
        lpips: LPIPS of the first frame and one group of frames a clip.
        low_bands: mean absolute error of the low Haar bands (whatever the model's wavelet), image frame plus
            video frames.
        high_bands: the same of the high bands.
        kl: KL divergence to a standard normal, summed over the latent.
        perceptual: `auto` uses LPIPS if the backbone's weights are found and warns otherwise, `lpips` insists,
            `none` goes without.
        perceptual_weights: file of the VGG16 backbone's weights; the torch cache is searched without it.
    """

    l1: NonNegativeFloat = 2.0
    lpips: NonNegativeFloat = 4.0
    low_bands: NonNegativeFloat = 0.1
    high_bands: NonNegativeFloat = 0.2
    kl: NonNegativeFloat = 1e-7
    perceptual: Literal["auto", "lpips", "none"] = "auto"
    perceptual_weights: str | None = None


class GANConfig(StrictConfig):
    """The adversarial loss: a PatchGAN on single frames.

    Attributes:
        weight: of the generator's adversarial loss.
        loss: of the discriminator.
        generator_loss: `non_saturating`, mean softplus(-logits), or `hinge`, -mean(logits).
        start_step: first step in which the discriminator trains and counts.
        warmup_steps: steps from then on in which the weight rises linearly from 0.
        lecam: weight of the LeCam regularisation of the discriminator.
        lecam_decay: decay of its running averages of the logits.
        learning_rate: of the discriminator.
        discriminator: its architecture.
    """

    weight: NonNegativeFloat = 0.2
    loss: Literal["hinge", "logistic"] = "hinge"
    generator_loss: Literal["non_saturating", "hinge"] = "non_saturating"
    start_step: NonNegativeInt = 0
    warmup_steps: NonNegativeInt = 0
    lecam: NonNegativeFloat = 0.005
    lecam_decay: Decay = 0.999
    learning_rate: PositiveFloat = 1e-5
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class OptimizerConfig(StrictConfig):
    """Adam with linear warm-up, then a cosine down to the final rate. Defaults: the published recipe.

    Attributes:
        learning_rate: highest rate of the autoencoder.
        final_learning_rate: rate at the end, of both networks (never above their highest).
        warmup_steps: steps of linear warm-up.
        betas: Adam's.
        weight_decay: decoupled (AdamW).
    """

    learning_rate: PositiveFloat = 5e-5
    final_learning_rate: NonNegativeFloat = 1e-5
    warmup_steps: NonNegativeInt = 5000
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    weight_decay: NonNegativeFloat = 0.0


class TrainingConfig(StrictConfig):
    """The course of a run.

    Attributes:
        max_steps: optimizer steps in all.
        batch_size: clips a step, over all ranks and passes.
        micro_batch_size: clips that a rank takes in one pass; the gradients of several passes are accumulated.
            Without it a rank takes its whole share at once. It bounds memory and changes no result.
        gradient_clipping: highest norm of each network's gradient; 0 turns clipping off.
        ema_decay: decay of the averaged weights (rises to it over the first steps).
        seed: of weights, data order, crops, noise.
        engine: `deepspeed`, or `plain` torch in one process (no DeepSpeed needed).
        log_every: steps between log lines.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        keep_checkpoints: newest checkpoints kept.
        validate_every: steps between evaluations on held-out clips; also before the first step and at the end.
        validation_clips: held-out clips evaluated.
        output: folder of the run, unless the command line names one.
    """

    max_steps: PositiveInt = 700_000
    batch_size: PositiveInt = 40
    micro_batch_size: PositiveInt | None = None
    gradient_clipping: NonNegativeFloat = 1.0
    ema_decay: Decay = 0.999
    seed: NonNegativeInt = 0
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 3
    validate_every: PositiveInt = 1000
    validation_clips: PositiveInt = 4
    output: str = "runs/video"

    def passes(self, world_size: int) -> int:
        """Passes a step on each of `world_size` ranks.

        Raises:
            ConfigError: the batch does not divide among the ranks, or a rank's share into its passes.
        """
        share, rest = divmod(self.batch_size, world_size)
        if rest:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}: it must be divisible by the number of ranks, {world_size}"
            )
        passes, rest = divmod(share, min(share, self.micro_batch_size or share))
        if rest:
            raise ConfigError(
                f"training.micro_batch_size is {self.micro_batch_size}: it must divide each rank's share "
                f"of the batch, {share}"
            )
        return passes


class TrainVideoConfig(StrictConfig):
    """Everything that `scripts/train_video.py` reads from its YAML file.

    `deepspeed` is DeepSpeed's own configuration (`zero_optimization`, `bf16`, ...), used for both networks.
    """

    model: LeanVAEConfig = LeanVAEConfig()
    data: DataConfig = DataConfig()
    losses: LossConfig = LossConfig()
    gan: GANConfig | None = GANConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        for key, field in _KEYS_OF_OURS.items():
            if key in self.deepspeed:
                raise ValueError(f"deepspeed.{key} is set by {field}: remove it from the deepspeed block")
        if "fp16" in self.deepspeed:
            raise ValueError("deepspeed.fp16: training in float16 is not supported, use bf16")
        if unknown := sorted(self.deepspeed.keys() - _DEEPSPEED_KEYS):
            raise ValueError(
                f"deepspeed.{unknown[0]}: unknown key; DeepSpeed's are {', '.join(sorted(_DEEPSPEED_KEYS))}"
            )
        group, patch_height, patch_width = self.model.patch_size
        if (self.data.num_frames - 1) % group:
            raise ValueError(f"data.num_frames is {self.data.num_frames}: model.patch_size needs {group}n + 1")
        height, width = self.data.resolution
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"data.resolution {self.data.resolution} is not divisible by model.patch_size "
                f"{(patch_height, patch_width)}"
            )
        return self
