"""LPIPS on a backbone file made here, against the lpips package and its properties.

The backbone's weights are random, its classifier one stretched number: what is tested is the reading of a file
in the published layout, not how well the distance agrees with people.
"""

import subprocess
import sys
import warnings

import pytest
import torch

from litevae.perceptual import PerceptualDistance, find_backbone, load_lpips, missing_backbone_message
from litevae.torchvision_compat import prepare_torchvision

# Output channels of VGG16's convolutions by their number in torchvision's `features`.
CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
CONVOLUTIONS |= dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
CLASSIFIER = {0: (4096, 512 * 7 * 7), 3: (4096, 4096), 6: (1000, 4096)}


def random_vgg16():
    """A state dict with the names and shapes of torchvision's VGG16."""
    generator = torch.Generator().manual_seed(0)
    state, in_channels = {}, 3
    for number, out_channels in CONVOLUTIONS.items():
        weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator)
        state[f"features.{number}.weight"] = weight * (2 / (9 * in_channels)) ** 0.5
        state[f"features.{number}.bias"] = 0.1 * torch.randn(out_channels, generator=generator)
        in_channels = out_channels
    for number, shape in CLASSIFIER.items():
        state[f"classifier.{number}.weight"] = torch.zeros(1, 1).expand(shape)
        state[f"classifier.{number}.bias"] = torch.zeros(shape[0])
    return state


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(random_vgg16(), folder / "vgg16-397923af.pth")
    return home


@pytest.fixture
def filled_cache(torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def distance(torch_home):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_lpips(str(torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth"))


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, 40, 32, generator=generator) * 2 - 1 for _ in range(2))


@pytest.mark.parity
def test_load_lpips_agrees_with_the_package_own_way(filled_cache, pair):
    prepare_torchvision()
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        reference = lpips.LPIPS(net="vgg", verbose=False)
    ours = load_lpips()
    with torch.no_grad():
        torch.testing.assert_close(ours(*pair), reference(*pair).flatten(), atol=1e-6, rtol=0)
    expected = reference.state_dict()
    assert expected.keys() == ours.network.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.network.state_dict().items())

    gradients = []
    for network in (ours, reference):
        prediction = pair[0].clone().requires_grad_()
        network(prediction, pair[1]).sum().backward()
        gradients.append(prediction.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_distance_is_zero_for_equal_images_and_symmetric(distance, pair):
    a, b = pair
    assert distance(a, a).tolist() == [0, 0]
    assert (distance(a, b) > 0).all()
    torch.testing.assert_close(distance(a, b), distance(b, a))


def test_distance_of_a_pair_does_not_depend_on_the_others(distance, pair):
    a, b = pair
    torch.testing.assert_close(distance(a[1:], b[1:]), distance(a, b)[1:])


def test_distance_is_frozen_and_never_trains(distance, pair):
    assert isinstance(distance, PerceptualDistance)
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    torch.nn.ModuleList([distance]).train()
    assert not any(module.training for module in distance.modules())
    assert torch.equal(distance(*pair), distance(*pair))


def test_gradient_stays_finite_where_all_features_vanish(distance, pair):
    class Silent(torch.nn.Module):
        def forward(self, x):
            return [torch.relu(x[:, :1] - 10).expand(-1, head.model[-1].in_channels, -1, -1) for head in heads]

    heads = distance.network.lins
    backbone, distance.network.net = distance.network.net, Silent()
    try:
        prediction = pair[0].clone().requires_grad_()
        distance(prediction, pair[1]).sum().backward()
    finally:
        distance.network.net = backbone
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()


def test_distance_takes_bfloat16_images(distance, pair):
    half = distance(*(images.bfloat16() for images in pair))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, distance(*pair), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 15, 32), (3, 32, 32), (2, 3, 4, 32, 32)])
def test_distance_refuses_what_is_no_image(distance, shape):
    with pytest.raises(ValueError, match="LPIPS needs"):
        distance(torch.zeros(shape), torch.zeros(shape))


def test_distance_refuses_shapes_that_differ(distance):
    with pytest.raises(ValueError, match=r"prediction has shape \(1, 3, 32, 32\)"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))


def test_find_backbone_looks_in_the_torch_cache(filled_cache):
    assert find_backbone(None) == filled_cache


def test_find_backbone_takes_an_explicit_file(empty_cache, torch_home):
    path = torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    assert find_backbone(str(path)) == path
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        find_backbone(str(empty_cache / "nowhere.pth"))


def test_missing_backbone_is_named_with_its_place(empty_cache):
    assert find_backbone(None) is None
    place = str(empty_cache / "hub" / "checkpoints" / "vgg16-397923af.pth")
    assert place in missing_backbone_message()
    with pytest.raises(FileNotFoundError, match=r"LPIPS needs the VGG16 weights vgg16-397923af\.pth"):
        load_lpips()


def test_file_without_the_classifier_and_in_the_old_format_is_read(tmp_path, distance, pair):
    path = tmp_path / "features.pth"
    features = {k: v for k, v in random_vgg16().items() if k.startswith("features.")}
    torch.save(features, path, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(load_lpips(str(path))(*pair), distance(*pair), atol=0, rtol=0)


def change(name, value):
    def edit(state):
        if value is None:
            del state[name]
        else:
            state[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("features.5.bias", None), "features.5.bias is missing"),
        (change("features.99.weight", torch.zeros(1)), "features.99.weight is unknown"),
        (change("features.0.bias", torch.zeros(7)), r"features.0.bias has shape \(7,\), not \(64,\)"),
        (lambda state: state.clear(), "features.0.weight is missing.* and 23 more"),
        (change("features.0.bias", 3), "expected a dictionary of tensors"),
    ],
)
def test_wrong_backbone_is_an_error_that_names_file_and_rule(tmp_path, edit, message):
    state = {k: torch.zeros(1).expand(v.shape) for k, v in random_vgg16().items()}
    edit(state)
    path = tmp_path / "wrong.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"wrong\.pth: .*{message}"):
        load_lpips(str(path))


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_pickled_code_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "bomb.pth"
    torch.save({"features.0.weight": Bomb()}, path)
    with pytest.raises(ValueError, match=r"bomb\.pth: cannot be read as tensors"):
        load_lpips(str(path))
    assert "boom" not in capsys.readouterr().out


def test_file_that_is_no_checkpoint_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "page.pth"
    path.write_text("<html>404</html>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.pth: cannot be read as tensors"):
        load_lpips(str(path))


@pytest.mark.parametrize("package", ["lpips", "torchvision"])
def test_missing_package_names_the_extra(torch_home, package):
    path = torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    # In a process of its own: a finder that denies the package, as if it were not installed.
    code = f"""
import importlib.abc, sys
class Denied(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Denied())
from litevae.perceptual import load_lpips
try:
    load_lpips({str(path)!r})
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'leanvae[lpips]'" in result.stdout
