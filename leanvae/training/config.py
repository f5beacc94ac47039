"""The configuration of a training run, read from one YAML file."""

from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_serializer,
    model_validator,
)

from leanvae.config import LeanVAEConfig
from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig, DataConfig, ImageDataConfig
from leanvae.training.curriculum import BatchRule, Curriculum, PhaseConfig, lay_out
from leanvae.training.deepspeed_block import check_block
from leanvae.training.gan import Decay, GANConfig, ImageGANConfig
from litevae.config import DOWNSAMPLING, LiteVAEConfig, StrictConfig


class LossTerm(StrictConfig):
    """A term of the loss: a number, or a mapping with these fields.

    Attributes:
        weight: its factor; 0 leaves it out.
        start_step: first step in which it counts.
    """

    weight: NonNegativeFloat
    start_step: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_a_weight(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float) else value

    @model_serializer
    def _as_short_as_it_was(self) -> float | dict[str, Any]:
        return {"weight": self.weight, "start_step": self.start_step} if self.start_step else self.weight

    def at(self, step: int) -> float:
        """Return the weight in a step."""
        return self.weight if step >= self.start_step else 0.0


def _term(weight: float) -> LossTerm:
    return LossTerm(weight=weight)


class LossConfig(StrictConfig):
    """Terms of the reconstruction loss, for pixels in [-1, 1]; each a weight, or `{weight: ..., start_step: ...}`.

    The defaults are those of LeanVAE's published recipe, rescaled, because its data are in [-0.5, 0.5].

    Attributes:
        l1: mean absolute error of pixels.
        l2: mean squared error of pixels, to which PSNR answers.
        borders: mean absolute step of the error across the borders of patches, which shows as blocks.
        lpips: LPIPS; of a clip's first frame and one group of frames.
        vgg: features of VGG19 before the activation (ESRGAN; LiteVAE, Table 14), of the same frames.
        low_bands: mean absolute error of the low Haar bands (for any wavelet of the model), image frame plus video
            frames.
        high_bands: the same for the high bands.
        wavelet: Charbonnier loss of the high Haar bands of each frame (LiteVAE, Table 9).
        gaussian: mean absolute error of what a Gaussian blur removes, of each frame (LiteVAE, Table 9).
        ldl: locally discriminative learning, of each frame (LiteVAE, Table 15); needs another pass, with the averaged
            weights.
        kl: KL divergence to a standard normal, summed over the latent.
        perceptual: `auto` uses the perceptual terms whose backbone's weights are found and warns of the others;
            `required` insists on them; `none` leaves them out.
        lpips_backbone: file of VGG16's weights; None searches torch's cache.
        vgg_backbone: file of VGG19's weights; None searches torch's cache.
    """

    l1: LossTerm = _term(2.0)
    l2: LossTerm = _term(0.0)
    borders: LossTerm = _term(0.0)
    lpips: LossTerm = _term(4.0)
    vgg: LossTerm = _term(0.0)
    low_bands: LossTerm = _term(0.1)
    high_bands: LossTerm = _term(0.2)
    wavelet: LossTerm = _term(0.0)
    gaussian: LossTerm = _term(0.0)
    ldl: LossTerm = _term(0.0)
    kl: LossTerm = _term(1e-7)
    perceptual: Literal["auto", "required", "none"] = "auto"
    lpips_backbone: str | None = None
    vgg_backbone: str | None = None


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


class FaultConfig(StrictConfig):
    """What to do about bad steps, whose loss or gradient is not finite and which update nothing.

    Attributes:
        max_bad_steps: number in a row after which the networks go back to an older checkpoint.
        max_rollbacks: how often they may go back in all; then the run stops.
        gan_weight_factor: factor applied to the GAN's weight at each rollback, if the GAN counted there.
    """

    max_bad_steps: PositiveInt = 5
    max_rollbacks: NonNegativeInt = 3
    gan_weight_factor: float = Field(default=0.5, ge=0.0, le=1.0)


class WandbConfig(StrictConfig):
    """The place where Weights & Biases shows a run; `WANDB_MODE=offline` keeps it in the run's folder.

    Attributes:
        project: its project.
        entity: user or team; None takes the account's default.
        name: name of the run; None lets Weights & Biases make one up.
    """

    project: str = Field(min_length=1)
    entity: str | None = None
    name: str | None = None


class TrainingConfig(StrictConfig):
    """The course of a run.

    Attributes:
        max_steps: total optimizer steps; with phases, where to stop before their end.
        batch_size: clips or images per step, over all ranks and passes.
        micro_batch_size: clips or images that a rank takes in one pass; the gradients of several passes are
            accumulated. None takes a rank's whole share at once. It bounds memory and changes no result.
        tokens_per_batch: instead of `batch_size`, most latent tokens per step, so that buckets of small samples get
            larger batches.
        batch_multiple: batch sizes by tokens are rounded down to a multiple of this; the number of ranks must divide
            it.
        tokens_per_micro_batch: instead of `micro_batch_size`, most latent tokens that a rank takes in one pass (at
            least one sample).
        gradient_clipping: highest norm of each network's gradient; 0 turns clipping off.
        ema_decay: decay of the averaged weights (rises to it over the first steps).
        seed: of weights, data order, crops, noise.
        start: how a new run of LeanVAE begins: `klt`, as the best linear codec of its own data (see
            `leanvae.training.start`), or `random`. A run with initial weights and one that resumes have their own.
        start_samples: samples from which `klt` takes its statistics.
        initial_weights: what a new run starts from instead: whatever `load_vae` reads. What does not fit the model is
            listed and starts anew. A run that resumes has its own.
        freeze: names of parameters of the autoencoder that stay as they are, with wildcards: `encoder.*`.
        activation_checkpointing: whether the autoencoder's blocks compute their activations again in the backward
            pass instead of keeping them: less memory for more time, and the same gradients.
        engine: `deepspeed`, or `plain` torch in one process (no DeepSpeed needed).
        compile: whether torch.compile compiles the autoencoder's forward and backward passes, once for each shape;
            not under ZeRO-3.
        faults: what to do about steps that are not finite.
        profile: first and last step, from 1, that each rank records in `trace.rank<R>.json` in the run's folder, for
            chrome://tracing or Perfetto.
        log_every: steps between log lines.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        keep_checkpoints: newest checkpoints kept.
        keep_every: checkpoints after a multiple of this number of steps are never removed.
        validate_every: steps between evaluations on held-out data; also before the first step and at the end.
        validation_clips: held-out clips to evaluate, and as many images.
        wandb: shows the run in Weights & Biases, too (`pip install 'leanvae[wandb]'`).
        output: folder of the run, unless the command line names one.
    """

    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 40
    micro_batch_size: PositiveInt | None = None
    tokens_per_batch: PositiveInt | None = None
    batch_multiple: PositiveInt = 1
    tokens_per_micro_batch: PositiveInt | None = None
    gradient_clipping: NonNegativeFloat = 1.0
    ema_decay: Decay = 0.999
    seed: NonNegativeInt = 0
    start: Literal["klt", "random"] = "klt"
    start_samples: PositiveInt = 128
    initial_weights: str | None = None
    freeze: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    compile: bool = False
    faults: FaultConfig = FaultConfig()
    profile: tuple[PositiveInt, PositiveInt] | None = None
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 3
    keep_every: PositiveInt | None = None
    validate_every: PositiveInt = 1000
    validation_clips: PositiveInt = 4
    wandb: WandbConfig | None = None
    output: str = "runs/video"

    @field_validator("profile")
    @classmethod
    def _steps_are_in_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value and value[0] > value[1]:
            raise ValueError(f"the first step comes after the last: {list(value)}")
        return value

    def is_logged(self, step: int) -> bool:
        """Return whether a step, counted from 0, is shown: the first, then one in `log_every`."""
        return step == 0 or (step + 1) % self.log_every == 0


class TrainConfig(StrictConfig):
    """The fields of every run's YAML file.

    Attributes:
        model, data, losses, gan, optimizer, training: see their classes; `gan: null` trains without a discriminator.
        phases: a curriculum of shapes, batch sizes and trained parts (LiteVAE, Section 4.3), one after the other; if
            empty, the run has one phase, given by `data` and `training`.
        deepspeed: DeepSpeed's own configuration (`zero_optimization`, `bf16`, ...), used for both networks.
    """

    model: LeanVAEConfig | LiteVAEConfig = LeanVAEConfig()
    data: DataConfig = DataConfig()
    losses: LossConfig = LossConfig()
    gan: GANConfig | None = GANConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    phases: tuple[PhaseConfig, ...] = ()
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    default_steps: ClassVar[int] = 0
    small_config: ClassVar[str] = ""

    @model_validator(mode="after")
    def _deepspeed_is_told_once(self) -> Self:
        check_block(self.deepspeed, compiles=self.training.compile)
        return self

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Pixels (frames, height, width) of a latent token."""
        if isinstance(self.model, LeanVAEConfig):
            return self.model.patch_size
        return (1, DOWNSAMPLING, DOWNSAMPLING)

    @property
    def stretches(self) -> tuple[PhaseConfig, ...]:
        """The phases, at least one."""
        return self.phases or (PhaseConfig(steps=self.training.max_steps or self.default_steps),)

    def shapes(self, phase: PhaseConfig) -> tuple[Shape, ...]:
        """Return the buckets of a phase."""
        if phase.buckets:
            return phase.buckets
        return self.data.shapes_at(phase.resolution) if phase.resolution else self.data.shapes

    def batch_rule(self, phase: PhaseConfig) -> BatchRule:
        """Return the rule for a phase's batch sizes."""
        training = self.training
        return BatchRule(
            patch_size=self.patch_size,
            batch=phase.batch or training.batch_size,
            micro_batch=phase.micro_batch or training.micro_batch_size,
            tokens_per_batch=phase.tokens_per_batch or (None if phase.batch else training.tokens_per_batch),
            multiple=training.batch_multiple,
            tokens_per_micro_batch=None if phase.micro_batch else training.tokens_per_micro_batch,
        )

    @property
    def curriculum(self) -> Curriculum:
        """The part of the run that depends only on the step number."""
        rules, shapes = map(self.batch_rule, self.stretches), map(self.shapes, self.stretches)
        return lay_out(self.stretches, list(rules), list(shapes), self.training.max_steps)


class TrainVideoConfig(TrainConfig):
    """The YAML file of `scripts/train_video.py`."""

    model: LeanVAEConfig = LeanVAEConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    data: ClipDataConfig = ClipDataConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    default_steps: ClassVar[int] = 700_000
    small_config: ClassVar[str] = "configs/demo_cpu.yaml"

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        group, *patch = self.model.patch_size
        if (self.data.num_frames - 1) % group:
            raise ValueError(f"data.num_frames is {self.data.num_frames}: model.patch_size needs {group}n + 1")
        buckets = {bucket for phase in self.stretches for bucket in self.shapes(phase)}
        for bucket in sorted(buckets):
            if (bucket.frames - 1) % group:
                raise ValueError(f"bucket {bucket} has {bucket.frames} frames: model.patch_size needs {group}n + 1")
        for kind in ("clips", "images"):
            has_bucket = any(bucket.is_image == (kind == "images") for bucket in buckets)
            if has_bucket != (kind in self.data.kinds):
                there, missing = ("bucket", "source") if has_bucket else ("source", "bucket")
                raise ValueError(f"data: there is a {there} of {kind}, but no {missing} of them")
        _check_resolutions(self, tuple(patch), "model.patch_size")
        if self.gan and self.gan.looks_at_gradients:
            field = "weighting" if self.gan.weighting == "adaptive" else "log_gradient_ratio"
            raise ValueError(f"gan.{field}: the video model has no single last layer; only for images")
        return self


# Defaults for images: the paper's rates, batch and discriminator, and LDM's hinge loss. The paper gives no loss
# weights; that pixels count once and the GAN starts after a quarter of the default steps is our choice.


class ImageLossConfig(LossConfig):
    """`LossConfig` with the defaults of LiteVAE: pixels and LPIPS count once."""

    l1: LossTerm = _term(1.0)
    lpips: LossTerm = _term(1.0)
    low_bands: LossTerm = _term(0.0)
    high_bands: LossTerm = _term(0.0)


class ImageOptimizerConfig(OptimizerConfig):
    """`OptimizerConfig` with the defaults of LiteVAE: a constant rate."""

    learning_rate: PositiveFloat = 1e-4
    final_learning_rate: NonNegativeFloat = 1e-4
    warmup_steps: NonNegativeInt = 0


class ImageTrainingConfig(TrainingConfig):
    """`TrainingConfig` with the batch of LiteVAE."""

    batch_size: PositiveInt = 16
    start: Literal["klt", "random"] = "random"
    output: str = "runs/image"


class TrainImageConfig(TrainConfig):
    """The YAML file of `scripts/train_image.py`.

    Defaults that differ from those of the blocks are LiteVAE's: Adam at a constant 1e-4, batches of 16, a UNet
    discriminator (Appendix F).
    """

    model: LiteVAEConfig = LiteVAEConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    data: ImageDataConfig = ImageDataConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    losses: ImageLossConfig = ImageLossConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    gan: ImageGANConfig | None = ImageGANConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    optimizer: ImageOptimizerConfig = ImageOptimizerConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    training: ImageTrainingConfig = ImageTrainingConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    default_steps: ClassVar[int] = 200_000
    small_config: ClassVar[str] = "configs/lite_demo_cpu.yaml"

    @model_validator(mode="after")
    def _starts_at_random(self) -> Self:
        if self.training.start == "klt":
            raise ValueError(
                "training.start is klt: only LeanVAE has a linear skeleton, LiteVAE starts at random weights"
            )
        return self

    @model_validator(mode="after")
    def _latents_are_whole(self) -> Self:
        _check_resolutions(self, (DOWNSAMPLING, DOWNSAMPLING), "the model's downsampling")
        if self.model.aggregation == "vit" and self.model.encoder == "wavelet":
            for bucket in {bucket for phase in self.stretches for bucket in self.shapes(phase)}:
                grid = tuple(side // DOWNSAMPLING for side in bucket.resolution)
                if grid != self.model.vit_grid:
                    raise ValueError(
                        f"model.vit_grid is {self.model.vit_grid}: images of {bucket.resolution} need {grid}"
                    )
        return self


def _check_resolutions(config: TrainConfig, step: tuple[int, ...], rule: str) -> None:
    for phase in config.stretches:
        for bucket in config.shapes(phase):
            if any(side % size for side, size in zip(bucket.resolution, step, strict=True)):
                raise ValueError(f"resolution {bucket.resolution} is not divisible by {rule} {step}")
