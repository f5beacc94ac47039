"""Perceptual distances of images: LPIPS (Zhang et al., 2018) on VGG16, and ESRGAN's on VGG19.

A backbone's ImageNet weights are read from a local file, never downloaded and never left random. The `lpips` package
provides LPIPS's architecture and learned heads; VGG19 needs no package.
"""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litevae.errors import InvalidInput, MissingFile
from litevae.torchvision_compat import prepare_torchvision

Backbone = Literal["vgg16", "vgg19"]

_BACKBONE_FILES: dict[Backbone, str] = {"vgg16": "vgg16-397923af.pth", "vgg19": "vgg19-dcbb9e9d.pth"}
_BACKBONE_URL = "https://download.pytorch.org/models"
_DISTANCES: dict[Backbone, str] = {"vgg16": "LPIPS", "vgg19": "VGG19's feature distance"}
_MIN_SIZE = 16  # four poolings precede the last features of either backbone
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_VGG19_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # width and number of convolutions
_MIN_SQUARED_NORM = 1e-20
_EPS = 1e-10


class _FrozenDistance(nn.Module):
    """A distance based on a frozen network."""

    def __init__(self, network: nn.Module) -> None:
        """Freeze the network.

        Args:
            network: the network with all its weights.
        """
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "_FrozenDistance":
        """Stay in evaluation mode: LPIPS's heads contain dropout, which a training parent would switch on."""
        return super().train(False)


class PerceptualDistance(_FrozenDistance):
    """LPIPS of pairs of images; frozen and always in evaluation mode."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute each pair's distance: squared differences of unit feature vectors, weighted, averaged and summed.

        Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (2018),
        Equation 1. It equals the package's own forward, whose gradient is NaN if all features of a position are zero.

        Args:
            prediction: `(N, 3, H, W)` in [-1, 1], sides of 16 pixels or more; cast to the network's dtype.
            target: the same shape and range.

        Returns:
            `(N,)`, non-negative.

        Raises:
            ValueError: the shapes differ or are not those of images large enough.
        """
        _check_images(prediction, target, "vgg16")
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


class FeatureDistance(_FrozenDistance):
    """L1 between VGG19's last convolution outputs before the activation; frozen and always in evaluation mode."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        """Freeze the network.

        Args:
            network: VGG19 up to conv5_4 with its weights, for images normalized by ImageNet's mean and standard
                deviation.
        """
        super().__init__(network)
        for name, values in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the distance of each pair: the mean absolute difference of the features.

        Source: Wang et al., "ESRGAN: enhanced super-resolution generative adversarial networks" (2018),
        Section 3.3; LiteVAE, Appendix D.1.

        Args:
            prediction: `(N, 3, H, W)` in [-1, 1], sides of 16 pixels or more; cast to the network's dtype.
            target: the same shape and range.

        Returns:
            `(N,)`, non-negative.

        Raises:
            ValueError: the shapes differ or are not those of images large enough.
        """
        _check_images(prediction, target, "vgg19")
        dtype = next(self.network.parameters()).dtype
        mean, std = self.mean.to(dtype), self.std.to(dtype)
        prediction_features, target_features = (
            self.network((0.5 * images.to(dtype) + 0.5 - mean) / std) for images in (prediction, target)
        )
        return (prediction_features - target_features).abs().mean(dim=(1, 2, 3))


def _check_images(prediction: Tensor, target: Tensor, backbone: Backbone) -> None:
    shape = tuple(prediction.shape)
    if prediction.shape != target.shape:
        raise InvalidInput(f"prediction has shape {shape}: expected the target's, {tuple(target.shape)}")
    if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < _MIN_SIZE:
        raise InvalidInput(
            f"images have shape {shape}: {_DISTANCES[backbone]} needs (N, 3, H, W) with H and W at least {_MIN_SIZE}"
        )


def _unit(features: Tensor) -> Tensor:
    """Scale feature vectors `(N, C, H, W)` to length 1; those of length 0 stay, with a finite gradient."""
    norm = features.square().sum(1, keepdim=True).clamp_min(_MIN_SQUARED_NORM).sqrt()
    return features / (norm + _EPS)


def _cached_backbone(backbone: Backbone) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE_FILES[backbone]


def find_backbone(path: str | None, backbone: Backbone = "vgg16") -> Path | None:
    """Find the file with a backbone's weights.

    Args:
        path: a file; None looks in torch's cache, by torchvision's name of the file.
        backbone: `vgg16` (`vgg16-397923af.pth`, for LPIPS) or `vgg19` (`vgg19-dcbb9e9d.pth`).

    Returns:
        The file; None if the cache does not have it.

    Raises:
        FileNotFoundError: `path` is not a file.
    """
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise MissingFile(f"{file}: no such file; expected torchvision's {_BACKBONE_FILES[backbone]}")
        return file
    return _cached_backbone(backbone) if _cached_backbone(backbone).is_file() else None


def missing_backbone_message(backbone: Backbone = "vgg16") -> str:
    """Return a sentence that says which file is missing and where to put it."""
    file = _BACKBONE_FILES[backbone]
    return (
        f"{_DISTANCES[backbone]} needs the {backbone.upper()} weights {file}, "
        f"which are not at {_cached_backbone(backbone)}: "
        f"put the file there (from {_BACKBONE_URL}/{file}), or name its path in the configuration"
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
    """Read the tensors of a file written by `torch.save`; nothing else is unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a wrong file
        raise InvalidInput(f"{path}: cannot be read as tensors saved by torch.save: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidInput(f"{path}: expected a dictionary of tensors")
    return state


def _load_exactly(module: nn.Module, state: dict[str, Tensor], path: Path, content: str) -> None:
    """Replace every tensor of `module`; names and shapes must match the file, which should hold `content`."""
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
        raise InvalidInput(f"{path}: not the weights of {content}: {', '.join(problems[:3])}{more}")
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)


def _load_backbone(layers: dict[str, nn.Module], path: Path, backbone: Backbone) -> None:
    """Load convolutions, named by their number in torchvision's `features`, from torchvision's file."""
    features = nn.ModuleDict({"features": nn.ModuleDict(layers)})
    weights = {k: v for k, v in _read_state_dict(path).items() if not k.startswith("classifier.")}
    _load_exactly(features, weights, path, backbone.upper())


def _require_backbone(path: str | None, backbone: Backbone) -> Path:
    file = find_backbone(path, backbone)
    if file is None:
        raise MissingFile(missing_backbone_message(backbone))
    return file


def _empty_network(lpips: ModuleType) -> Any:
    """Make the package's network without memory for its weights, so that none can keep its random values."""
    with torch.device("meta"), warnings.catch_warnings():
        # The package uses old names of torchvision's arguments.
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)


def load_lpips(path: str | None = None) -> PerceptualDistance:
    """Load LPIPS with VGG16's weights from a local file and the heads from the `lpips` package.

    Args:
        path: torchvision's VGG16 weights (the classifier's may be absent); None looks in torch's cache.

    Returns:
        The distance, frozen, in float32 on the CPU.

    Raises:
        FileNotFoundError: the weights are not there; the message says where to put them.
        ModuleNotFoundError: `lpips` or torchvision is not installed; the message names the extra.
        ValueError: the file holds no tensors, or not those of VGG16.
    """
    backbone = _require_backbone(path, "vgg16")
    lpips = _import_lpips()
    network = _empty_network(lpips)

    # The slices of the package's backbone number the layers as torchvision does.
    layers = {number: layer for part in network.net.children() for number, layer in part.named_children()}
    _load_backbone(layers, backbone, "vgg16")

    heads_file = Path(str(lpips.__file__)).parent / "weights" / "v0.1" / "vgg.pth"
    heads = nn.ModuleDict({f"lin{index}": head for index, head in enumerate(network.lins)})
    _load_exactly(heads, _read_state_dict(heads_file), heads_file, "LPIPS's heads on VGG16")

    assert not any(tensor.is_meta for tensor in network.state_dict().values())
    return PerceptualDistance(network)


def _empty_vgg19() -> nn.Sequential:
    """Make VGG19 up to conv5_4, numbered as in torchvision, without memory for its weights."""
    layers: list[nn.Module] = []
    in_channels = 3
    for width, num_convolutions in _VGG19_STAGES:
        for _ in range(num_convolutions):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
            in_channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-2])  # the distance is taken before the last activation


def load_vgg_features(path: str | None = None) -> FeatureDistance:
    """Load the distance of VGG19's features, with weights from a local file.

    Args:
        path: torchvision's VGG19 weights (the classifier's may be absent); None looks in torch's cache.

    Returns:
        The distance, frozen, in float32 on the CPU.

    Raises:
        FileNotFoundError: the weights are not there; the message says where to put them.
        ValueError: the file holds no tensors, or not those of VGG19.
    """
    backbone = _require_backbone(path, "vgg19")
    network = _empty_vgg19()
    _load_backbone(dict(network.named_children()), backbone, "vgg19")
    assert not any(tensor.is_meta for tensor in network.state_dict().values())
    return FeatureDistance(network)
