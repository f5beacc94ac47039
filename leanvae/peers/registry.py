"""The registry of models, each with its configuration and the place where that was published.

Weights are random, because cost does not depend on them. The configurations of other projects' models are from the
`config.json` beside their published weights, on huggingface.co under the name in `source`; defaults of the diffusers
class are left out.
"""

import difflib
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanvae.checkpoint import load_vae
from leanvae.config import LeanVAEConfig
from leanvae.model import LeanVAE
from leanvae.named import may_name_weights, packaged_names
from leanvae.peers.models import ANY_LENGTH, Kind, Lengths, Model, latent_of
from litevae.config import LiteVAEConfig
from litevae.errors import InvalidInput, MissingPackage, extra
from litevae.model import LiteVAE

logger = logging.getLogger("leanvae")


def _lean(latent_channels: int, decoder_norm: Literal["layer", "smc"]) -> Model:
    config = {"latent_channels": latent_channels, "decoder_norm": decoder_norm}

    def build() -> nn.Module:
        return LeanVAE(LeanVAEConfig(**config))

    suffix = "-smc" if decoder_norm == "smc" else ""
    source = "configs/lean_17f.yaml" if suffix else "LeanVAE paper; configs/lean_17f_published.yaml"
    name = f"leanvae-c{latent_channels}{suffix}"
    return Model(name, "video", build, source, config, frames=Lengths(1, 4), is_ours=True)


def _lite(name: str, preset: str, note: str = "") -> Model:
    def build() -> nn.Module:
        return LiteVAE(LiteVAEConfig.preset(preset))

    source = f'LiteVAE paper, Tables 2, 23 and 24; LiteVAEConfig.preset("{preset}")'
    return Model(name, "image", build, source, {"preset": preset}, is_ours=True, note=note)


def _encode_in_default_layout(vae: nn.Module, x: Tensor) -> Tensor:
    """Run the SD-VAE's encoder on contiguous images, as most of its users do."""
    mean, _ = vae.after_encoder(vae.encoder(x)).chunk(2, dim=1)  # pyright: ignore[reportCallIssue]
    return mean


def _sd_in_default_layout() -> Model:
    model = _lite(
        "sd-vae-nchw", "SD-VAE", "sd-vae with its encoder run in the default memory layout, not channels-last"
    )
    return Model(**{**vars(model), "encode": _encode_in_default_layout})


def _diffusers(name: str, kind: Kind, class_name: str, source: str, **fields: Any) -> Model:
    config = fields.pop("config", {})

    def build() -> nn.Module:
        vae = diffusers_class(class_name)(**config)
        if fields.get("tiled_only"):
            vae.enable_tiling()
        return vae

    return Model(name, kind, build, f"diffusers.{class_name}; {source}", config, **fields)


def diffusers_class(name: str) -> Any:
    """Return a model class of diffusers.

    Raises:
        MissingPackage: diffusers is not installed, or has no such class.
    """
    from litevae.torchvision_compat import prepare_torchvision

    prepare_torchvision()  # several modules of diffusers import it if it is installed
    with extra("bench"):
        diffusers = importlib.import_module("diffusers")
    if not hasattr(diffusers, name):
        raise MissingPackage(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


_SD_BLOCKS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_DC_AE = {
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_WAN_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
}
_FOUR, _EIGHT = Lengths(1, 4), Lengths(1, 8)
_THIRTY_TWO = {"height": Lengths(32, 32), "width": Lengths(32, 32)}

REGISTRY: dict[str, Model] = {
    model.name: model
    for model in [
        _lean(4, "layer"),
        _lean(4, "smc"),
        _lean(16, "layer"),
        _lean(16, "smc"),
        _lite("litevae-s", "S"),
        _lite("litevae-b", "B"),
        _lite("litevae-m", "M", "its encoder costs more FLOPs than the SD-VAE's"),
        _lite("litevae-l", "L", "its encoder costs more FLOPs than the SD-VAE's"),
        _lite("sd-vae", "SD-VAE", "ours, which reads the released weights; runs in channels-last"),
        _sd_in_default_layout(),
        _diffusers(
            "autoencoder-kl", "image", "AutoencoderKL", "stabilityai/stable-diffusion-2-1, vae", config=_SD_BLOCKS
        ),
        _diffusers("taesd", "image", "AutoencoderTiny", "madebyollin/taesd: the class's defaults"),
        _diffusers(
            "dc-ae",
            "image",
            "AutoencoderDC",
            "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
            config=_DC_AE,
            **_THIRTY_TWO,
        ),
        _diffusers(
            "wan-2.1",
            "video",
            "AutoencoderKLWan",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, vae: the class's defaults",
            frames=_FOUR,
        ),
        _diffusers(
            "wan-2.2",
            "video",
            "AutoencoderKLWan",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers, vae (without its latent statistics)",
            config=_WAN_22,
            frames=_FOUR,
            height=Lengths(16, 16),
            width=Lengths(16, 16),
        ),
        _diffusers(
            "hunyuanvideo",
            "video",
            "AutoencoderKLHunyuanVideo",
            "hunyuanvideo-community/HunyuanVideo, vae: the class's defaults",
            frames=_FOUR,
        ),
        _diffusers(
            "cogvideox",
            "video",
            "AutoencoderKLCogVideoX",
            "THUDM/CogVideoX-5b, vae: the class's defaults except for the scale of the latents",
            frames=_FOUR,
        ),
        _diffusers(
            "ltx-video",
            "video",
            "AutoencoderKLLTXVideo",
            "diffusers/LTX-Video-0.9.0, vae: the class's defaults",
            frames=_EIGHT,
            **_THIRTY_TWO,
        ),
        _diffusers(
            "mochi",
            "video",
            "AutoencoderKLMochi",
            "genmo/mochi-1-preview, vae: the class's defaults",
            frames=Lengths(1, 6),
        ),
        _diffusers(
            "allegro",
            "video",
            "AutoencoderKLAllegro",
            "rhymes-ai/Allegro, vae: the class's defaults",
            tiled_only=True,
            frames=Lengths(24, 16),
            height=Lengths(320, 200),
            width=Lengths(320, 240),
            note="works only in tiles of 24x320x320; smaller clips are padded to one",
        ),
        _diffusers(
            "cosmos",
            "video",
            "AutoencoderKLCosmos",
            "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8, vae: the class's defaults",
            frames=_EIGHT,
        ),
        _diffusers(
            "vidtok",
            "video",
            "AutoencoderVidTok",
            "microsoft/VidTok, vidtok_kl_causal_488_4chn: the class's defaults",
            frames=Lengths(4, 4, lead=3),
        ),
    ]
}


def find_model(name: str) -> Model:
    """Return a model of the registry, a checkpoint that `load_vae` reads, or the result of `package.module:factory`.

    Raises:
        ValueError: it is none of these, or the factory is missing; the message lists the registry or names the factory.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if may_name_weights(name):
        is_video = isinstance(load_vae(name), LeanVAE)
        return _users_model(name, lambda: load_vae(name), "weights on disk", "video" if is_video else "image")
    module, colon, factory = name.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), factory]):
        make = _find_factory(name, module, factory)
        return _users_model(name, make, "the user's own", _kind_of(name, make()))
    weights = ["FOLDER of a checkpoint", *packaged_names(), "OWNER/NAME on the Hugging Face hub"]
    choose("model", name, [*REGISTRY, *weights, "package.module:factory"])
    raise AssertionError


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`.

    Raises:
        ValueError: it is not; the message lists all, and the nearest one.
    """
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise InvalidInput(f"{kind} {name!r} is unknown{hint}: expected one of {', '.join(known)}")


def _find_factory(name: str, module: str, factory: str) -> Callable[[], nn.Module]:
    """Return the factory of a user's model; errors inside its module keep their traceback."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InvalidInput(f"model {name!r} cannot be made: {error}") from error
    if not hasattr(imported, factory):
        raise InvalidInput(f"model {name!r} cannot be made: module {module!r} has no attribute {factory!r}")
    return getattr(imported, factory)


def _users_model(name: str, build: Callable[[], nn.Module], source: str, kind: Kind) -> Model:
    """Make the entry of a model that is not in the registry."""
    return Model(name, kind, build, source, frames=_FOUR if kind == "video" else ANY_LENGTH, has_weights=True)


# What models raise for a shape that they do not take. Anything else is a bug in the model, and not caught.
_REFUSALS = (ValueError, RuntimeError, IndexError, AssertionError)


@torch.inference_mode()
def _kind_of(name: str, vae: nn.Module) -> Kind:
    """Tell whether a user's model takes clips or images: try a small clip, then, if that is refused, an image.

    Raises:
        InvalidInput: it takes neither, or only clips of one frame; the message has its reasons.
    """
    like = next(vae.parameters(), torch.empty(0))
    vae.eval()

    def refusal(*shape: int) -> Exception | None:
        try:
            latent_of(vae.encode(like.new_zeros(1, 3, *shape)))  # pyright: ignore[reportCallIssue]
        except _REFUSALS as error:
            return error
        return None

    of_clip = refusal(5, 64, 64)
    if of_clip is None:
        return "video"
    if refusal(1, 64, 64) is None:
        raise InvalidInput(f"model {name!r} takes a clip of 1 frame but not of 5: {of_clip}") from of_clip
    of_image = refusal(64, 64)
    if of_image is not None:
        raise InvalidInput(
            f"model {name!r} takes neither a clip (1, 3, 5, 64, 64): {of_clip}; nor an image (1, 3, 64, 64): {of_image}"
        ) from of_clip
    logger.info(
        "model %s: treated as an image model, because it refuses clips: %s", name, str(of_clip).partition("\n")[0]
    )
    return "image"
