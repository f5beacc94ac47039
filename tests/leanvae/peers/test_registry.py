"""The registry: every entry builds, and takes and returns the sizes that it declares."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.bench.modes import MODES, lacks_mode, runners
from leanvae.peers.models import Model, Size, decode, encode, latent_of
from leanvae.peers.registry import REGISTRY, find_model
from litevae.errors import InvalidInput

SMALL = {"low_channels": 4, "high_channels": 8, "num_fusion_layers": 1, "ista_iterations": 1}
FACTORY = """
import torch
from torch import nn

class Halver(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
    def encode(self, x):
        return self.down(x)
    def decode(self, latent):
        return self.up(latent)
"""


class Plain(nn.Module):
    """A model with only what it needs."""

    def encode(self, x: Tensor) -> Tensor:
        return x


def small_model() -> Model:
    return Model("small", "video", lambda: LeanVAE(LeanVAEConfig(**SMALL)), "here")


@pytest.mark.parametrize("name", REGISTRY)
def test_models_give_back_what_they_took(name: str) -> None:
    model = REGISTRY[name]
    vae = model.build_on_meta()
    size = model.fit(Size(6, 40, 60))
    with torch.inference_mode(), torch.device("meta"):
        x = torch.empty(model.pixels_shape(size))
        latent = encode(model, vae, x)
        decoded = decode(vae, latent)
    # Allegro gives (B, T, C, H, W).
    expected = 3 * Size(size.frames - model.frames.lead, size.height, size.width).num_pixels
    assert decoded.numel() == expected
    assert latent.numel() < x.numel()
    assert model.source


def test_unknown_models_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"model 'wan' is unknown.*wan-2\.1.*package\.module:factory"):
        find_model("wan")
    with pytest.raises(ValueError, match="cannot be made: No module named 'nowhere'"):
        find_model("nowhere.at_all:make")
    with pytest.raises(ValueError, match=r"cannot be made: .*has no attribute 'missing'"):
        find_model("leanvae.model:missing")


def test_models_of_users_are_found_by_folder_and_by_dotted_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LeanVAE(LeanVAEConfig(**SMALL)).save_pretrained(tmp_path / "model")
    (tmp_path / "my_bench_factory.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    folder, dotted = find_model(str(tmp_path / "model")), find_model("my_bench_factory:Halver")
    assert (folder.kind, dotted.kind) == ("video", "image")
    assert folder.has_weights
    assert dotted.has_weights
    assert dotted.fit(Size(17, 64, 64)) == Size(1, 64, 64)


# Models of users: what each does is in its name.
USERS_MODELS = """
import torch
from torch import nn

class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 2, stride=2)
    def encode(self, x):
        return self.down(x)

class Clips(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(3, 4, 1).half()
    def encode(self, x):
        assert x.dtype == torch.half
        return self.down(x)

class AssertsImages(Images):
    def encode(self, x):
        assert x.ndim == 4, "images alone"
        return x

class UnpacksImages(Images):
    def encode(self, x):
        batch, channels, height, width = x.shape
        return x

class LooksAtValues(Clips):
    def encode(self, x):
        return self.down(x) if x.abs().max().item() < 2 else x

class WrongType(Clips):
    def encode(self, x):
        return self.down(x) + "1"

class WrongName(Clips):
    def encode(self, x):
        return self.down(x).no_such_method()

class WrongOnlyAfterTheFirstFrame(Clips):
    def encode(self, x):
        first = self.down(x[:, :, :1]) if x.ndim == 5 else x
        if x.ndim == 5 and x.shape[2] > 1:
            return first + self.down(x[:, :, 1:])[:, :3]
        return first

class WrongChannels(Images):
    def encode(self, x):
        return self.down(x[:, :2])
"""


@pytest.fixture
def users_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "users_models.py").write_text(USERS_MODELS, encoding="utf-8")
    (tmp_path / "broken_module.py").write_text("import math\nmath.no_such_name\n", encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import nowhere_to_be_found\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("users_models", "broken_module", "needs_more"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("users_models")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Images", "image"),
        ("AssertsImages", "image"),
        ("UnpacksImages", "image"),
        ("Clips", "video"),
        ("LooksAtValues", "video"),
    ],
)
def test_models_of_users_are_tried_on_a_clip_and_an_image(name: str, kind: str) -> None:
    assert find_model(f"users_models:{name}").kind == kind


@pytest.mark.usefixtures("users_models")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("WrongType", TypeError, "unsupported operand"),
        ("WrongName", AttributeError, "no_such_method"),
        ("WrongOnlyAfterTheFirstFrame", InvalidInput, "takes a clip of 1 frame but not of 5: The size of tensor"),
        ("WrongChannels", InvalidInput, r"neither a clip \(1, 3, 5, 64, 64\): .*; nor an image .*to have 3 channels"),
    ],
)
def test_failing_models_of_users_are_not_taken_for_image_models(
    name: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_model(f"users_models:{name}")


@pytest.mark.usefixtures("users_models")
def test_what_fails_inside_a_users_module_keeps_its_own_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name") as caught:
        find_model("broken_module:make")
    assert not isinstance(caught.value, InvalidInput)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        find_model("needs_more:make")


def test_latents_are_found_in_whatever_an_encoder_returns() -> None:
    class Posterior:
        def mode(self) -> Tensor:
            return torch.ones(2)

    class Output:
        latent_dist = Posterior()

    for encoded in (torch.ones(2), Posterior(), Output()):
        assert torch.equal(latent_of(encoded), torch.ones(2))


def test_modes_that_a_model_lacks_are_told() -> None:
    plain = REGISTRY["taesd"].build_on_meta()
    assert lacks_mode(plain, "whole") is None
    assert "compile" in (lacks_mode(plain, "compiled") or "")
    assert "chunks" in (lacks_mode(plain, "chunked") or "")
    assert "tiles" in (lacks_mode(Plain(), "tiled") or "")
    assert lacks_mode(REGISTRY["wan-2.1"].build_on_meta(), "tiled") is None
    allegro = REGISTRY["allegro"].build_on_meta()
    assert lacks_mode(allegro, "tiled") is None
    assert allegro.use_tiling, "a look must not switch off what the model cannot do without"


@pytest.mark.parametrize("mode", MODES)
def test_modes_compute_what_the_whole_does(mode: str) -> None:
    model = small_model()
    torch.manual_seed(0)
    vae = model.build().eval()
    if mode == "compiled" or lacks_mode(vae, mode) is not None:
        pytest.skip("the model lacks it, or it takes a compiler")
    x = 2 * torch.rand(1, 3, 17, 16, 24) - 1
    with torch.inference_mode():
        latent = encode(model, vae, x)
        run_encoder, run_decoder = runners(model, vae, mode, Size(17, 16, 24))
        torch.testing.assert_close(run_encoder(x), latent, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run_decoder(latent), decode(vae, latent), atol=1e-5, rtol=1e-5)
