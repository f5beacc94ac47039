"""The registry: every entry builds, and takes and gives the sizes that it says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.bench.modes import MODES, lacks_mode, runners
from leanvae.peers.models import Model, Size, decode, encode, latent_of
from leanvae.peers.registry import REGISTRY, find_model

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
    """A model with nothing but what it needs."""

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
    with pytest.raises(ValueError, match=r"model 'wan' is not known.*wan-2\.1.*package\.module:factory"):
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
