"""VGG19's feature distance on a backbone file made here, against torchvision's network and its properties.

The weights are random: what is tested is the reading of a file in the published layout and the arithmetic.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from litevae.perceptual import FeatureDistance, find_backbone, load_vgg_features, missing_backbone_message
from litevae.torchvision_compat import prepare_torchvision

FILE = "vgg19-dcbb9e9d.pth"


def torchvision_vgg19():
    """Torchvision's network without memory for its weights."""
    prepare_torchvision()
    from torchvision.models import vgg19

    with torch.device("meta"):
        return vgg19(weights=None).eval()


@pytest.fixture(scope="module")
def state():
    """Random weights under torchvision's names, the classifier's shrunk to stretched numbers."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in torchvision_vgg19().state_dict().items():
        if name.startswith("classifier."):
            weights[name] = torch.zeros(1).expand(tensor.shape)
        elif tensor.ndim == 4:
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        else:
            weights[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    return weights


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory, state):
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / FILE)
    return home


@pytest.fixture(scope="module")
def distance(torch_home):
    return load_vgg_features(str(torch_home / "hub" / "checkpoints" / FILE))


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, 40, 33, generator=generator) * 2 - 1 for _ in range(2))


@pytest.mark.parity
def test_distance_agrees_with_torchvision(state, distance, pair):
    reference = torchvision_vgg19().features
    weights = {name.removeprefix("features."): w for name, w in state.items() if name.startswith("features.")}
    reference.load_state_dict(weights, assign=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    assert isinstance(reference[34], nn.Conv2d)
    assert not any(isinstance(layer, nn.Conv2d) for layer in reference[35:])

    def expected(prediction, target):
        a, b = (reference[:35](((images + 1) / 2 - mean) / std) for images in (prediction, target))
        return torch.stack([nn.functional.l1_loss(a[n], b[n]) for n in range(len(a))])

    gradients = []
    for function in (distance, expected):
        prediction = pair[0].clone().requires_grad_()
        value = function(prediction, pair[1])
        value.sum().backward()
        gradients.append(prediction.grad)
    torch.testing.assert_close(distance(*pair), expected(*pair), rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_distance_is_zero_for_equal_images_and_symmetric(distance, pair):
    a, b = pair
    assert distance(a, a).tolist() == [0, 0]
    assert (distance(a, b) > 0).all()
    torch.testing.assert_close(distance(a, b), distance(b, a))
    torch.testing.assert_close(distance(a[1:], b[1:]), distance(a, b)[1:])


def test_distance_leaves_the_images_alone_and_takes_bfloat16(distance, pair):
    copies = [images.clone() for images in pair]
    half = distance(*(images.bfloat16() for images in copies))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, distance(*copies), rtol=0.05, atol=0)
    assert all(torch.equal(copy, images) for copy, images in zip(copies, pair, strict=True))


def test_distance_is_frozen_and_never_trains(distance):
    assert isinstance(distance, FeatureDistance)
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    nn.ModuleList([distance]).train()
    assert not any(module.training for module in distance.modules())


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 15, 32), (3, 32, 32), (2, 3, 4, 32, 32)])
def test_distance_refuses_what_is_no_image(distance, shape):
    with pytest.raises(ValueError, match="VGG19's feature distance needs"):
        distance(torch.zeros(shape), torch.zeros(shape))


def test_distance_refuses_shapes_that_differ(distance):
    with pytest.raises(ValueError, match=r"prediction has shape \(1, 3, 32, 32\)"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))


def test_backbone_is_found_in_the_torch_cache(torch_home, monkeypatch, distance, pair):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    assert find_backbone(None, "vgg19") == torch_home / "hub" / "checkpoints" / FILE
    assert find_backbone(None) is None
    assert torch.equal(load_vgg_features()(*pair), distance(*pair))


def test_missing_backbone_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_backbone(None, "vgg19") is None
    message = missing_backbone_message("vgg19")
    assert str(tmp_path / "hub" / "checkpoints" / FILE) in message
    assert f"https://download.pytorch.org/models/{FILE}" in message
    with pytest.raises(
        FileNotFoundError, match=r"VGG19's feature distance needs the VGG19 weights vgg19-dcbb9e9d\.pth"
    ):
        load_vgg_features()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file; expected torchvision's vgg19-dcbb"):
        load_vgg_features(str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features.34.weight", None, "not the weights of VGG19: features.34.weight is missing"),
        ("features.99.bias", torch.zeros(1), "features.99.bias is unknown"),
        ("features.0.bias", torch.zeros(7), r"features.0.bias has shape \(7,\), not \(64,\)"),
    ],
)
def test_wrong_backbone_is_an_error_that_names_file_and_rule(tmp_path, state, name, value, message):
    wrong = {k: torch.zeros(1).expand(v.shape) for k, v in state.items()} | {name: value}
    path = tmp_path / "wrong.pth"
    torch.save({k: v for k, v in wrong.items() if v is not None}, path)
    with pytest.raises(ValueError, match=rf"wrong\.pth: .*{message}"):
        load_vgg_features(str(path))


def test_file_without_the_classifier_is_read_without_torchvision(tmp_path, state):
    path = tmp_path / "features.pth"
    features = {k: torch.zeros(1).expand(v.shape) for k, v in state.items() if k.startswith("features.")}
    torch.save(features, path)
    code = f"""
import sys
sys.modules["torchvision"] = None
from litevae.perceptual import load_vgg_features
load_vgg_features({str(path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
