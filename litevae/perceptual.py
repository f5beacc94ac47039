"""LPIPS, the learned perceptual distance (Zhang et al., 2018), on a VGG16 read from a local file.

The `lpips` package brings the architecture and the learned heads; the ImageNet weights of the backbone are
never downloaded, and never left random.
"""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from litevae.torchvision_compat import prepare_torchvision

_BACKBONE_FILE = "vgg16-397923af.pth"
_BACKBONE_URL = f"https://download.pytorch.org/models/{_BACKBONE_FILE}"
_MIN_SIZE = 16  # four poolings stand before the last features
_MIN_SQUARED_NORM = 1e-20
_EPS = 1e-10


class PerceptualDistance(nn.Module):
    """LPIPS of pairs of images; frozen, and always in evaluation mode."""

    def __init__(self, network: nn.Module) -> None:
        """Freezes the network.

        Args:
            network: an `lpips.LPIPS` with all its weights.
        """
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode: the heads hold a dropout that a training parent would switch on."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of each pair: squared differences of unit feature vectors, weighted, averaged and summed.

        Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (2018),
        Equation 1. Equal to the package's own forward, whose gradient however is not a number wherever all
        features of a position are zero.

        Args:
            prediction: `(N, 3, H, W)` in [-1, 1], sides of 16 pixels or more; cast to the network's dtype.
            target: the same shape and range.

        Returns:
            `(N,)`, non-negative.

        Raises:
            ValueError: the shapes differ or are not those of images large enough.
        """
        _check_images(prediction, target)
        network: Any = self.network
        dtype = next(network.parameters()).dtype
        prediction_features, target_features = (
            network.net(network.scaling_layer(images.to(dtype))) for images in (prediction, target)
        )
        distances = [
            head((_unit(a) - _unit(b)).square()).mean(dim=(1, 2, 3))
            for head, a, b in zip(network.lins, prediction_features, target_features, strict=True)
        ]
        return torch.stack(distances).sum(0)


def _check_images(prediction: Tensor, target: Tensor) -> None:
    shape = tuple(prediction.shape)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {shape}: it must be the target's, {tuple(target.shape)}")
    if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < _MIN_SIZE:
        raise ValueError(f"images have shape {shape}: LPIPS needs (N, 3, H, W) with H and W at least {_MIN_SIZE}")


def _unit(features: Tensor) -> Tensor:
    """Feature vectors `(N, C, H, W)` of length 1; those of length 0 stay, with a finite gradient."""
    norm = features.square().sum(1, keepdim=True).clamp_min(_MIN_SQUARED_NORM).sqrt()
    return features / (norm + _EPS)


def _cached_backbone() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE_FILE


def find_backbone(path: str | None) -> Path | None:
    """The file of VGG16's weights.

    Args:
        path: a file; or None to look in torch's cache, for `vgg16-397923af.pth`.

    Returns:
        The file; None when the cache does not hold it.

    Raises:
        FileNotFoundError: a path is given, but is no file.
    """
    if path is not None:
        backbone = Path(path).expanduser()
        if not backbone.is_file():
            raise FileNotFoundError(f"{backbone}: no such file; expected torchvision's {_BACKBONE_FILE}")
        return backbone
    return _cached_backbone() if _cached_backbone().is_file() else None


def missing_backbone_message() -> str:
    """One sentence that says which file is missing and where to put it."""
    return (
        f"LPIPS needs the VGG16 weights {_BACKBONE_FILE}, which are not at {_cached_backbone()}: "
        f"put the file there (from {_BACKBONE_URL}), or name its path in the configuration"
    )


def _import_lpips() -> ModuleType:
    try:
        if prepare_torchvision():
            import lpips

            return lpips
    except ModuleNotFoundError as error:
        if error.name != "lpips":
            raise
    raise ModuleNotFoundError(
        "LPIPS needs the packages lpips and torchvision: pip install 'leanvae[lpips]'", name="lpips"
    )


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote; nothing else is unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is not what it should be
        raise ValueError(f"{path}: cannot be read as tensors saved by torch.save: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors")
    return state


def _load_exactly(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Replaces every tensor of `module`; names and shapes must agree."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: not the weights of LPIPS on VGG16: {', '.join(problems[:3])}{more}")
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)


def _empty_network(lpips: ModuleType) -> Any:
    """The package's network without memory for its weights, so that none can stay as it was drawn."""
    with torch.device("meta"), warnings.catch_warnings():
        # The package passes arguments that torchvision has renamed.
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)


def load_lpips(path: str | None = None) -> PerceptualDistance:
    """LPIPS with VGG16's weights from a local file and the heads that ship with the `lpips` package.

    Args:
        path: torchvision's VGG16 weights (the classifier's may be absent); None looks in torch's cache.

    Returns:
        The distance, frozen, in float32 on the CPU.

    Raises:
        FileNotFoundError: the weights are not there; the message says where to put them.
        ModuleNotFoundError: `lpips` or torchvision is not installed; the message names the extra.
        ValueError: the file holds no tensors, or not those of VGG16.
    """
    backbone = find_backbone(path)
    if backbone is None:
        raise FileNotFoundError(missing_backbone_message())
    lpips = _import_lpips()
    network = _empty_network(lpips)

    # The slices of the package's backbone keep the numbers that the layers have in torchvision's.
    layers = {number: layer for part in network.net.children() for number, layer in part.named_children()}
    features = nn.ModuleDict({"features": nn.ModuleDict(layers)})
    weights = _read_state_dict(backbone).items()
    _load_exactly(features, {k: v for k, v in weights if not k.startswith("classifier.")}, backbone)

    heads_file = Path(str(lpips.__file__)).parent / "weights" / "v0.1" / "vgg.pth"
    heads = nn.ModuleDict({f"lin{index}": head for index, head in enumerate(network.lins)})
    _load_exactly(heads, _read_state_dict(heads_file), heads_file)

    assert not any(tensor.is_meta for tensor in network.state_dict().values())
    return PerceptualDistance(network)
