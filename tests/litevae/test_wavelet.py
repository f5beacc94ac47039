"""The wavelet transforms against ptwt, and their own properties."""

import ptwt
import pytest
import torch

from litevae import wavelet as W


def bands_by_ptwt(x):
    low, (high_h, high_w, high_hw) = ptwt.wavedec2(x, "haar", level=1)
    return torch.cat((low, high_h, high_w, high_hw), dim=1)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dwt2d_agrees_with_ptwt(dtype):
    x = torch.randn(2, 3, 12, 20, dtype=dtype)
    torch.testing.assert_close(W.dwt2d(x), bands_by_ptwt(x), atol=1e-6, rtol=0)


@pytest.mark.parity
def test_dwt3d_agrees_with_ptwt():
    x = torch.randn(2, 3, 8, 12, 20, dtype=torch.float64)
    low, details = ptwt.wavedec3(x, "haar", level=1)
    names = ["aad", "ada", "add", "daa", "dad", "dda", "ddd"]
    expected = torch.cat([low, *(details[name] for name in names)], dim=1)
    torch.testing.assert_close(W.dwt3d(x), expected, atol=1e-6, rtol=0)


# ptwt's own matrix transform is built on sparse tensors, about which torch warns.
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parity
@pytest.mark.parametrize("name", ["db2", "sym4", "coif1", "bior2.2"])
def test_other_wavelets_agree_with_ptwt_matrices(name):
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    # ptwt's matrix transform names its two mixed bands the other way round than its padded one and pywt.
    low, (high_w, high_h, high_hw) = ptwt.MatrixWavedec2(name, 1)(x)
    torch.testing.assert_close(W.dwt2d(x, name), torch.cat((low, high_h, high_w, high_hw), dim=1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db2", "db4", "sym4", "bior4.4", "rbio3.1"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_transforms_are_invertible(name, dtype, tolerance):
    image = torch.randn(1, 2, 20, 26).to(dtype)
    clip = torch.randn(1, 2, 4, 20, 26).to(dtype)
    assert W.dwt2d(image, name).shape == (1, 8, 10, 13)
    assert W.dwt3d(clip, name).shape == (1, 16, 2, 10, 13)
    torch.testing.assert_close(W.idwt2d(W.dwt2d(image, name), name), image, atol=tolerance, rtol=0)
    torch.testing.assert_close(W.idwt3d(W.dwt3d(clip, name), name), clip, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_orthogonal_transforms_keep_energy(name):
    x = torch.randn(2, 3, 4, 16, 8, dtype=torch.float64)
    torch.testing.assert_close(W.dwt3d(x, name).norm(), x.norm())


@pytest.mark.parity
def test_multilevel_agrees_with_ptwt():
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    pyramid = W.multilevel_dwt2d(x, 3)
    low, deep, middle, shallow = ptwt.wavedec2(x, "haar", level=3)
    torch.testing.assert_close(pyramid[2], torch.cat((low, *deep), dim=1), atol=1e-10, rtol=0)
    torch.testing.assert_close(pyramid[1][:, 3:], torch.cat((*middle,), dim=1), atol=1e-10, rtol=0)
    torch.testing.assert_close(pyramid[0][:, 3:], torch.cat((*shallow,), dim=1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_multilevel_is_invertible_without_the_shallow_low_bands(name):
    x = torch.randn(1, 3, 32, 16, dtype=torch.float64)
    pyramid = W.multilevel_dwt2d(x, 2, name)
    pyramid[0][:, :3] = float("nan")
    torch.testing.assert_close(W.multilevel_idwt2d(pyramid, name), x, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_multilevel_3d_transforms_the_low_band_again(name):
    x = torch.randn(1, 3, 8, 16, 24, dtype=torch.float64)
    pyramid = W.multilevel_dwt3d(x, 2, name)
    torch.testing.assert_close(pyramid[0], W.dwt3d(x, name))
    torch.testing.assert_close(pyramid[1], W.dwt3d(pyramid[0][:, :3], name))
    torch.testing.assert_close(W.multilevel_idwt3d(pyramid, name), x, atol=1e-11, rtol=0)


def test_matrices_made_in_inference_mode_serve_training():
    x = torch.randn(1, 3, 26, 22)
    with torch.inference_mode():
        W.dwt2d(x, "sym3")
    x.requires_grad_()
    W.dwt2d(x, "sym3").sum().backward()
    assert x.grad is not None


def test_dwt2d_transforms_each_frame_of_a_clip():
    clip = torch.randn(1, 3, 5, 8, 8)
    for t in range(5):
        torch.testing.assert_close(W.dwt2d(clip)[:, :, t], W.dwt2d(clip[:, :, t]))


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_transforms_have_gradients(name):
    x = torch.randn(1, 1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: W.dwt3d(v, name), x)
    assert torch.autograd.gradcheck(lambda v: W.idwt2d(W.dwt2d(v, name) ** 2, name), x)


@pytest.mark.parametrize("shape", [(1, 3, 7, 8), (1, 3, 8, 9)])
def test_odd_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="odd length"):
        W.dwt2d(torch.zeros(shape))


def test_sizes_shorter_than_the_wavelet_are_refused():
    with pytest.raises(ValueError, match="'db4' needs at least 8"):
        W.dwt2d(torch.zeros(1, 3, 6, 16), "db4")


def test_levels_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        W.multilevel_dwt2d(torch.zeros(1, 3, 8, 8), 0)


def test_unknown_wavelet_is_refused():
    with pytest.raises(ValueError, match="'dbx'"):
        W.check_wavelet("dbx")
