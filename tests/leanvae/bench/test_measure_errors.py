import pytest
import torch

from leanvae.bench.measure_errors import split_error


@pytest.fixture
def reference():
    clip = torch.zeros(3, 9, 32, 48)
    clip[:, :, :, 24:] = 0.5  # an edge
    clip[:, 5:, :8, :8] = 0.9  # appears in frame 5
    return clip


def test_the_parts_hold_the_whole_error(reference):
    output = reference + 0.1 * torch.randn(reference.shape)
    squared = (output - reference).double().square()
    for way, parts in split_error(reference, output, 4).items():
        whole = squared if way in ("surface", "frame", "scale") else squared[:, 1:]
        assert sum(error for error, _ in parts.values()) == pytest.approx(whole.sum().item(), rel=1e-5), way
        if way != "time":
            assert sum(count for _, count in parts.values()) == whole.numel(), way


def test_errors_are_found_where_they_are(reference):
    def where(error):
        return {
            way: {name for name, (value, _) in parts.items() if value > 1e-9}
            for way, parts in split_error(reference, reference + error, 4).items()
        }

    at_edge = torch.zeros_like(reference)
    at_edge[:, 0, :, 23] = 0.1
    found = where(at_edge)
    assert found["surface"] == {"edges"}
    assert found["frame"] == {"first"}
    assert not found["motion"]
    assert not found["time"]

    moving = torch.zeros_like(reference)
    moving[:, 5, :8, :8] = 0.1
    found = where(moving)
    assert found["motion"] == {"moving"}
    assert found["frame"] == {"1 of its group"}
    assert found["scale"] == {"8 pixels and more"}
    assert found["time"] == {"mean of its group", "change within its group"}

    steady = torch.zeros_like(reference)
    steady[:, 1:5, 16:, 2::4] = 0.1
    assert where(steady)["time"] == {"mean of its group"}
    assert where(steady)["surface"] == {"flat"}
