"""Feature networks: their architecture against references, and the loader with weights made here."""

import functools

import pytest
import torch
from torch import nn

from leanvae.metrics.i3d import I3D, _pad_same
from leanvae.metrics.inception import InceptionV3
from leanvae.metrics.networks import load_feature_networks
from litevae.torchvision_compat import prepare_torchvision

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
I3D_FILE = "rgb_imagenet.pt"
VGG_FILE = "vgg16-397923af.pth"


def _with_lively_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw random weights for which a signal neither vanishes nor grows through the layers."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.8, 1.2)
    return module.eval()


@pytest.mark.parity
@torch.no_grad()
def test_inception_is_torchvisions_with_the_poolings_of_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    if not prepare_torchvision():
        pytest.skip("torchvision is not installed")
    from torchvision.models import inception_v3

    theirs = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    _with_lively_weights(theirs)
    theirs.fc = nn.Identity()
    ours = InceptionV3().eval()
    state = theirs.state_dict() | {f"fc.{name}": value for name, value in ours.fc.state_dict().items()}
    ours.load_state_dict(state, strict=True)

    average, maximum = nn.functional.avg_pool2d, nn.functional.max_pool2d
    monkeypatch.setattr(nn.functional, "avg_pool2d", functools.partial(average, count_include_pad=False))
    last = theirs.Mixed_7c.forward

    def with_maxima(x: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "avg_pool2d", maximum)
            return last(x)

    monkeypatch.setattr(theirs.Mixed_7c, "forward", with_maxima)
    images = torch.randint(0, 256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(1)) / 255
    expected = theirs(2 * images - 1)
    assert expected.std() > 0.1
    assert torch.allclose(ours(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_inception_sees_8_bits_as_files_of_images_have() -> None:
    network = _with_lively_weights(InceptionV3())
    levels = torch.randint(0, 256, (1, 3, 75, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(levels / 255), network((levels + 0.4) / 255))


def test_i3d_has_the_published_weights_and_sizes() -> None:
    network = _with_lively_weights(I3D())
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264
    names = network.state_dict()
    assert names["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert names["Mixed_4f.b1b.conv3d.weight"].shape == (320, 160, 3, 3, 3)
    assert names["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)
    clips = torch.rand(2, 3, 16, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = network(clips)
        assert both.shape == (2, 400)
        assert torch.allclose(network(clips[:1]), both[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (16, 7, 2, (2, 3)),
        (15, 7, 2, (3, 3)),
        (8, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (5, 2, 2, (0, 1)),
        (9, 1, 1, (0, 0)),
    ],
)
def test_padding_is_tensorflows(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    x = torch.ones(1, 1, size, 4, 4)
    padded = _pad_same(x, (kernel, 1, 1), (stride, 1, 1))[0, 0, :, 0, 0]
    before, after = expected
    assert padded.tolist() == [0] * before + [1] * size + [0] * after


def test_networks_without_files_are_named_with_where_to_put_them(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = load_feature_networks(tmp_path)
    assert networks.names() == []
    for metric, file, sentence in zip(
        ("LPIPS", "rFID", "rFVD"), (VGG_FILE, INCEPTION_FILE, I3D_FILE), networks.missing, strict=True
    ):
        assert sentence.startswith(f"{metric} is left out")
        assert f"put {file} into {tmp_path}" in sentence
        assert "https://" in sentence
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert str(tmp_path / "home" / "hub" / "checkpoints") in load_feature_networks().missing[0]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_feature_networks(tmp_path / "none")


def test_networks_are_loaded_from_files_of_tensors(tmp_path) -> None:
    inception, i3d = _with_lively_weights(InceptionV3()), _with_lively_weights(I3D())
    torch.save(inception.state_dict(), tmp_path / INCEPTION_FILE)
    # The published file is older than this counter.
    old = {name: value for name, value in i3d.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / I3D_FILE)
    networks = load_feature_networks(tmp_path)
    assert networks.names() == ["rfid", "rfvd"]
    assert networks.image is not None
    assert networks.video is not None
    images, clip = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 16, 32, 32)
    with torch.no_grad():
        assert torch.equal(networks.image(images), inception(images))
        assert torch.equal(networks.video(clip), i3d(clip))
    assert not any(parameter.requires_grad for parameter in networks.image.parameters())


def test_lpips_is_loaded_from_the_folder(tmp_path) -> None:
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
    layers = {str(number): nn.Conv2d(*channels, 3) for number, channels in widths.items()}
    torch.save(nn.ModuleDict({"features": nn.ModuleDict(layers)}).state_dict(), tmp_path / VGG_FILE)
    networks = load_feature_networks(tmp_path)
    assert networks.names() == ["lpips"]
    assert networks.lpips is not None
    images = torch.rand(1, 3, 32, 32)
    assert networks.lpips(images, images).item() == 0
    assert networks.lpips(images, images.flip(3)).item() > 0


class _Malicious:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (print, ("executed",))  # pyright: ignore[reportReturnType]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:'torch.load' received a zip:UserWarning")
@pytest.mark.parametrize("kind", ["pickle", "text", "list", "other", "torchscript"])
def test_files_of_anything_else_are_refused(tmp_path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = tmp_path / I3D_FILE
    if kind == "pickle":
        torch.save(_Malicious(), path)
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "other":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    with pytest.raises(ValueError, match=I3D_FILE):
        load_feature_networks(tmp_path)
    assert "executed" not in capsys.readouterr().out
