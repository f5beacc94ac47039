"""Reconstruction of clips, images and folders, with a tiny random model."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig, load_vae
from leanvae.inference.plan import ClipPlan, plan_reconstruction
from leanvae.media.image import read_image
from leanvae.media.naming import find_inputs
from leanvae.media.video import VideoReader
from leanvae.media.writer import VideoWriter, write_png
from leanvae.metrics.frames import psnr
from leanvae.reconstruct import reconstruct
from litevae import LiteVAE, LiteVAEConfig
from litevae.errors import NotFinite, WorkIncomplete


def probe(path):
    with VideoReader(str(path), square=False) as reader:
        return reader.info


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VFR = [33, 66, 100, 250, 251, 900, 1400, 1433, 1466, 1600]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LeanVAEConfig(
        low_channels=8, high_channels=8, num_stream_layers=1, num_fusion_layers=1, ista_iterations=1, ista_layers=1
    )
    LeanVAE(config).save_pretrained(folder)
    return folder


def _image(height: int, width: int, shift: float = 0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + shift) / 9), np.cos((y - shift) / 7), np.sin((x + y) / 11)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def _write_clip(path: Path, height: int = 36, width: int = 52, pts: list[int] = VFR) -> None:
    with VideoWriter(path, width, height, time_base=Fraction(1, 1000), rate=Fraction(30)) as writer:
        for index, stamp in enumerate(pts):
            writer.write(_image(height, width, 3 * index), stamp)


def _times(path: Path) -> list[Fraction]:
    time_base = probe(path).time_base
    return [frame.pts * time_base for frame in iter_frames(path) if frame.pts is not None]


def _expected_psnr(checkpoint: Path, path: Path) -> float:
    """Mean over frames of the whole clip at once, with no video coding in between."""
    frames = torch.from_numpy(np.stack([frame.image for frame in iter_frames(path)])).movedim(-1, 1) / 255
    clip = frames.transpose(0, 1)[None]
    vae = load_vae(checkpoint)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(2 * clip - 1).mode(), size=clip.shape[2:])
    return psnr(((decoded + 1) / 2).clamp(0, 1), clip).mean().item()


@pytest.mark.parametrize(("height", "width", "pix_fmt"), [(36, 52, "yuv420p"), (35, 53, "yuv444p")])
def test_reconstruct_keeps_timestamps_size_and_frames(
    tmp_path: Path, checkpoint: Path, height: int, width: int, pix_fmt: str
) -> None:
    source = tmp_path / "it's a clip.mp4"
    _write_clip(source, height, width)
    report = reconstruct(checkpoint, source, tmp_path / "out")
    recon, both = tmp_path / "out" / "it's a clip.recon.mp4", tmp_path / "out" / "it's a clip.side_by_side.mp4"
    assert _times(recon) == _times(both) == _times(source) == [Fraction(stamp, 1000) for stamp in VFR]
    info = probe(recon)
    assert (info.width, info.height, info.pix_fmt, info.rotation) == (width, height, pix_fmt, 0)
    assert (probe(both).width, probe(both).height) == (2 * width, height)
    left = np.stack([frame.image[:, :width] for frame in iter_frames(both)]).astype(float)
    assert np.abs(left - np.stack([frame.image for frame in iter_frames(source)])).mean() < 3
    (result,) = report["files"]
    assert (result["frames"], result["width"], result["height"]) == (10, width, height)
    assert result["psnr"] == pytest.approx(_expected_psnr(checkpoint, source), abs=1e-3)
    assert report["total"]["psnr"] == result["psnr"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report


def test_reconstruct_does_not_depend_on_the_chunk(tmp_path: Path, checkpoint: Path) -> None:
    _write_clip(tmp_path / "clip.mp4")
    whole = reconstruct(checkpoint, tmp_path / "clip.mp4", tmp_path / "a", chunk=100)["files"][0]
    for chunk in (1, 3, 4):
        assert reconstruct(checkpoint, tmp_path / "clip.mp4", tmp_path / "b", chunk=chunk)["files"][0] == {
            **whole,
            "psnr": pytest.approx(whole["psnr"], abs=1e-4),
            "ssim": pytest.approx(whole["ssim"], abs=1e-5),
        }


def test_reconstruct_stands_rotated_clips_upright(tmp_path: Path, checkpoint: Path) -> None:
    source = tmp_path / "clip.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(90)
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(_image(32, 64, index), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(source).rotation in (90, 270)
    reconstruct(checkpoint, source, tmp_path / "out")
    info = probe(tmp_path / "out" / "clip.recon.mp4")
    assert (info.width, info.height, info.rotation) == (32, 64, 0)
    with av.open(str(tmp_path / "out" / "clip.recon.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(3, 4)


def test_reconstruct_starts_broadcast_clocks_at_zero(tmp_path: Path, checkpoint: Path) -> None:
    source = tmp_path / "clip.ts"
    with av.open(str(source), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        audio = container.add_stream("aac", rate=48000, layout="mono")
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(_image(32, 64, index), "rgb24")
            frame.pts, frame.time_base = 90000 * 3600 + 3600 * index, Fraction(1, 90000)
            container.mux(stream.encode(frame))
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 48000, 48000 * 3600 + 1920 * index, Fraction(1, 48000)
            container.mux(audio.encode(sound))
        container.mux(stream.encode(None))
        container.mux(audio.encode(None))
    reconstruct(checkpoint, source, tmp_path / "out")
    frames = list(iter_frames(tmp_path / "out" / "clip.recon.mp4"))
    assert [frame.time for frame in frames] == pytest.approx([frame.time for frame in iter_frames(source)], abs=1e-4)
    assert frames[0].time < 0.1
    with av.open(str(tmp_path / "out" / "clip.recon.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert abs(next(container.decode(audio=0)).time or 0) < 0.1


def test_reconstruct_folder_takes_clips_and_images_and_lists_the_broken(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    _write_clip(folder / "deep" / "a.mp4")
    write_png(folder / "a.png", _image(35, 29))
    (folder / "b.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("no media")
    (folder / "._a.mp4").write_bytes(b"hidden")
    report = reconstruct(checkpoint, folder, tmp_path / "out")
    assert [entry["input"] for entry in report["files"]] == ["a.png", "deep/a.mp4"]
    assert report["skipped"] == [{"input": "b.mp4", "reason": "empty file"}]
    total = report["total"]
    assert (total["files"], total["skipped"], total["frames"]) == (2, 1, 11)
    image, clip = report["files"]
    assert total["psnr"] == pytest.approx((image["psnr"] + 10 * clip["psnr"]) / 11)
    assert (image["kind"], image["fps"], clip["kind"]) == ("image", None, "video")
    assert read_image(tmp_path / "out" / "a.recon.png").shape == (35, 29, 3)
    both = read_image(tmp_path / "out" / "a.side_by_side.png")
    assert np.array_equal(both[:, :29], _image(35, 29))
    assert np.array_equal(both[:, 29:], read_image(tmp_path / "out" / "a.recon.png"))
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {
        "metrics.json",
        "a.recon.png",
        "a.side_by_side.png",
        "deep/a.recon.mp4",
        "deep/a.side_by_side.mp4",
    }
    with pytest.raises(WorkIncomplete, match=r"1 of 3 files .*b\.mp4: empty file"):
        reconstruct(checkpoint, folder, tmp_path / "strict", strict=True)
    assert json.loads((tmp_path / "strict" / "metrics.json").read_text())["total"]["files"] == 2


def test_reconstruct_fails_when_nothing_could_be_done(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(WorkIncomplete, match="1 of 1 files"):
        reconstruct(checkpoint, tmp_path / "a.mp4", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        reconstruct(checkpoint, tmp_path / "missing.mp4", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        reconstruct(tmp_path / "none", tmp_path / "a.mp4", tmp_path / "out")


def test_reconstruct_refuses_a_model_that_gives_nan(tmp_path: Path, checkpoint: Path) -> None:
    vae = load_vae(checkpoint)
    with torch.no_grad():
        vae.logvar.bias.zero_()
        next(vae.decoder.parameters()).fill_(torch.nan)
    vae.save_pretrained(tmp_path / "broken")
    write_png(tmp_path / "a.png", _image(16, 16))
    with pytest.raises(NotFinite, match=r"a\.png: the decoder's output is not finite"):
        reconstruct(tmp_path / "broken", tmp_path / "a.png", tmp_path / "out")


def test_reconstruct_runs_in_bfloat16(tmp_path: Path, checkpoint: Path) -> None:
    _write_clip(tmp_path / "clip.mp4", pts=[0, 40, 80])
    results = [
        reconstruct(checkpoint, tmp_path / "clip.mp4", tmp_path / "out", dtype=dtype)["files"][0]["psnr"]
        for dtype in (None, torch.bfloat16)
    ]
    assert results[0] == pytest.approx(results[1], abs=0.5)
    assert results[0] != results[1]


def test_find_inputs_gives_every_file_a_name_of_its_own(tmp_path: Path) -> None:
    for name in ["a.jpg", "a.png", "A.mp4", "b.webm", "a.jpg.png", "sub/a.jpg", "out/a.recon.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    jobs = find_inputs(tmp_path, tmp_path / "out")
    assert {job.name: job.target for job in jobs} == {
        "A.mp4": "A.mp4",
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "a.jpg.png": "a.jpg.png",
        "b.webm": "b",
        "sub/a.jpg": "sub/a",
    }
    assert [job.is_video for job in jobs] == [True, False, False, False, True, False]


def test_find_inputs_refuses_folders_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no clips or images found"):
        find_inputs(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="choose another"):
        find_inputs(tmp_path, tmp_path / "." / "")


def test_plans_take_fewer_frames_and_then_tiles_of_larger_ones() -> None:
    with torch.device("meta"):
        vae = LeanVAE()
    plans = [plan_reconstruction(vae, *size, memory_limit=8 * 2**30) for size in [(640, 480), (1920, 1080)]]
    assert all(plan.tile is None for pair in plans for plan in pair)
    assert [plan.latent_frames for plan in plans[0]] == [16, 16]
    assert 1 <= plans[1][0].latent_frames == plans[1][1].latent_frames < 16
    with pytest.raises(ValueError, match=r"memory_limit is 8\.00 GiB: to reconstruct frames of 3840x2160 needs about"):
        plan_reconstruction(vae, 3840, 2160, memory_limit=8 * 2**30)
    encoding, decoding = plan_reconstruction(vae.bfloat16(), 3840, 2160, memory_limit=8 * 2**30)
    assert encoding.tile is not None
    assert decoding.tile is not None


def test_chunks_of_a_clip_are_no_larger_than_asked_for() -> None:
    with torch.device("meta"):
        vae = LeanVAE()
    assert [plan_reconstruction(vae, 64, 64, chunk=chunk)[0].latent_frames for chunk in (1, 4, 11, 100)] == [
        1,
        1,
        2,
        25,
    ]
    with pytest.raises(ValueError, match="chunk is 0: expected at least one frame"):
        plan_reconstruction(vae, 64, 64, chunk=0)


def test_reconstruct_in_tiles_equals_whole_frames(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_clip(tmp_path / "clip.mp4", 144, 120)
    whole = reconstruct(checkpoint, tmp_path / "clip.mp4", tmp_path / "a")["files"][0]
    plans = [ClipPlan(plan.load, 1, (8, 8)) for plan in plan_reconstruction(load_vae(checkpoint), 120, 144)]
    monkeypatch.setattr("leanvae.coder.plan_reconstruction", lambda *_: plans)
    tiled = reconstruct(checkpoint, tmp_path / "clip.mp4", tmp_path / "b")["files"][0]
    assert tiled == {**whole, "psnr": pytest.approx(whole["psnr"], abs=1e-4), "ssim": pytest.approx(whole["ssim"])}


def test_reconstruct_checks_the_memory_limit(tmp_path: Path, checkpoint: Path) -> None:
    _write_clip(tmp_path / "clip.mp4")
    for limit, message in [
        ("much", "expected a positive number of bytes"),
        ("1MiB", "to reconstruct frames of 52x36 needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            reconstruct(checkpoint, tmp_path / "clip.mp4", tmp_path / "out", memory_limit=limit)


def test_reconstruct_takes_clips_through_image_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 4}
    vae = LiteVAE(LiteVAEConfig(**small, extraction_multipliers=(1,), aggregation_multipliers=(1,)))
    vae.save_pretrained(tmp_path / "checkpoint")
    _write_clip(tmp_path / "clip.mp4")
    report = reconstruct(tmp_path / "checkpoint", tmp_path / "clip.mp4", tmp_path / "out")
    assert report["files"][0]["frames"] == len(VFR)
    assert report["files"][0]["psnr"] == pytest.approx(
        reconstruct(tmp_path / "checkpoint", tmp_path / "clip.mp4", tmp_path / "out", chunk=1)["files"][0]["psnr"]
    )


@pytest.mark.integration
@pytest.mark.skipif(not DATA.exists(), reason="needs the shared data")
@pytest.mark.parametrize(
    "name",
    [
        "exo_bear_odd_161x121.webm",
        pytest.param("exo_desk_h263.3gp", marks=pytest.mark.slow),
        pytest.param("streamio_toys_rot90_14f.mov", marks=pytest.mark.slow),
    ],
)
def test_reconstruct_keeps_what_real_clips_have(tmp_path: Path, checkpoint: Path, name: str) -> None:
    source = DATA / "dev" / "videos" / name
    report = reconstruct(checkpoint, source, tmp_path)
    recon = tmp_path / report["files"][0]["reconstruction"]
    assert _times(recon) == _times(source)
    old, new = probe(source), probe(recon)
    assert (old.width, old.height, old.has_audio) == (new.width, new.height, new.has_audio)
    assert report["files"][0]["notes"] == []
