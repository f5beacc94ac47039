"""Encoding into a store: the content of entries, each clip exactly once after any fault, and refusals."""

import json
import os
import sys
import tarfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from safetensors.torch import load

from leanvae import load_vae
from leanvae.cli.main import main
from leanvae.coder import to_model
from leanvae.data.samples import Cut, cut_picture
from leanvae.latents import clips as clips_module
from leanvae.latents import encode
from leanvae.latents.clips import ClipRequest, ClipRule, Finished, Piece, Rejected, decode_ahead, decode_source
from leanvae.latents.encode import encode_clips
from leanvae.latents.encoder import ClipEncoder, EncodedClip
from leanvae.latents.store import Store, StoreError
from leanvae.latents.verify import verify_store
from leanvae.media.item import Item
from leanvae.media.video import VideoReader
from litevae import LiteVAE, LiteVAEConfig


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


def members(store):
    """Read all members of the store's tars by name, only with tarfile."""
    found = []
    for path in sorted(Path(store, "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(info.name, tar.extractfile(info).read()) for info in tar]
    assert len(dict(found)) == len(found), "a member is there twice"
    return dict(found)


def keys(store):
    return {name.partition(".")[0] for name in members(store)}


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 32, 48)])
def test_bytes_become_what_the_model_takes(shape):
    vae = torch.nn.Linear(1, 1)
    clips = [np.random.default_rng().integers(0, 256, (*shape, 3), np.uint8) for _ in range(3)]
    expected = torch.stack([torch.from_numpy(clip).double() / 127.5 - 1 for clip in clips]).permute(0, 4, 1, 2, 3)
    x = to_model(clips, vae)
    assert x.is_contiguous()
    assert x.dtype == torch.float32
    assert torch.allclose(x.double(), expected, rtol=0, atol=2e-7)
    assert torch.equal(to_model(clips, vae.bfloat16()), x.bfloat16())


def pixels(images):
    """(T, H, W, 3) bytes as `(1, 3, T, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).movedim(-1, 0)[None].float() / 127.5 - 1


def test_entries_hold_the_posterior_and_what_it_is_of(checkpoint, make_job, clips, tmp_path):
    summary = encode_clips([str(clips)], tmp_path / "store", make_job(flips=True, thumbnails=True))
    assert {name: summary[name] for name in ("clips", "frames", "sources", "shards", "unfinished")} == {
        "clips": 5,
        "frames": 25,
        "sources": 4,
        "shards": 1,
        "unfinished": 0,
    }
    reasons = {Path(entry["source"]).name: entry["reason"] for entry in summary["skipped"]}
    assert reasons.keys() == {"short.mp4", "broken.mp4"}
    assert reasons["short.mp4"] == "too short: 3 frames, 5 needed"
    key = f"{Item(f'{clips}/a.mp4', 'clip').id}_0000004"
    stored = members(tmp_path / "store")
    tensors, facts = load(stored[f"{key}.safetensors"]), json.loads(stored[f"{key}.json"])
    frames = list(iter_frames(clips / "a.mp4"))[4:9]
    images = [cut_picture(frame.image, (32, 32), Cut()) for frame in frames]
    vae = load_vae(checkpoint)
    with torch.inference_mode():
        for prefix, x in (("", pixels(images)), ("flipped_", pixels(images).flip(-1))):
            posterior = vae.encode(x)
            for name in ("mean", "logvar"):
                actual = tensors[f"{prefix}{name}"]
                assert actual.dtype == torch.float16
                torch.testing.assert_close(actual.float(), getattr(posterior, name)[0], rtol=1e-3, atol=1e-4)
    assert facts["times"] == pytest.approx([frame.time for frame in frames], abs=1e-6)
    expected = {"key": key, "source": f"{clips}/a.mp4", "first_frame": 4, "stride": 1, "fps": 25.0, "size": [5, 32, 32]}
    expected |= {"source_size": [48, 64], "resized": [32, 43], "crop": [0, 6], "latent_shape": [4, 2, 4, 4]}
    expected |= {"dtype": "float16", "flipped": True, "columns": {}, "caption": None, "start": 0.0, "end": None}
    assert {name: facts[name] for name in expected} == expected
    assert facts["checkpoint"] == Store(tmp_path / "store").manifest()["checkpoint"]
    thumbnail = cv2.imdecode(np.frombuffer(stored[f"{key}.jpg"], np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(thumbnail.astype(float) - images[0]).mean() < 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_reads_the_shards(store):
    shards = [str(path) for path in sorted(Path(store, "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert {sample["__key__"] for sample in samples} == keys(store)
    assert all(load(sample["safetensors"])["mean"].shape == (4, 2, 4, 4) for sample in samples)
    assert all(json.loads(sample["json"])["key"] == sample["__key__"] for sample in samples)


def test_index_tells_where_entries_lie(store):
    rows = pq.read_table(store / "index.parquet").to_pylist()
    stored = members(store)
    assert {row["key"] for row in rows} == keys(store)
    for row in rows:
        data = Path(store, "shards", f"{row['shard']}.tar").read_bytes()
        assert data[row["offset"] : row["offset"] + row["bytes"]] == stored[f"{row['key']}.safetensors"]


def test_tables_bring_parts_of_files_and_captions(clips, make_job, tmp_path):
    (clips / "t.csv").write_text("path,start,end,caption,score\na.mp4,0.2,0.4,a wave,3\n")
    encode_clips([f"{clips}/t.csv"], tmp_path / "store", make_job(ClipRule()))
    (facts,) = [json.loads(data) for name, data in members(tmp_path / "store").items() if name.endswith("json")]
    assert facts["times"] == pytest.approx([0.2, 0.24, 0.28, 0.32, 0.36])
    assert facts["columns"] == {"caption": "a wave", "score": 3}
    assert facts["size"] == [5, 48, 64]
    assert Store(tmp_path / "store").index()["caption"].to_pylist() == ["a wave"]


def test_done_sources_are_not_opened_again_but_new_and_mended_ones_are_added(clips, make_job, write_clip, tmp_path):
    encode_clips([str(clips)], tmp_path / "store", make_job())
    shards = Path(tmp_path, "store", "shards")
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    content = (clips / "a.mp4").read_bytes()
    (clips / "a.mp4").write_bytes(b"whatever")
    summary = encode_clips([str(clips)], tmp_path / "store", make_job())
    assert (summary["clips"], summary["run"]["clips"], len(summary["skipped"])) == (5, 0, 2)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    (clips / "a.mp4").write_bytes(content)
    write_clip(clips / "new.mp4", num_frames=5, seed=7)
    write_clip(clips / "broken.mp4", num_frames=5, seed=8)
    summary = encode_clips([str(clips)], tmp_path / "store", make_job())
    assert (summary["clips"], summary["run"]["clips"]) == (7, 2)
    assert [Path(entry["source"]).name for entry in summary["skipped"]] == ["short.mp4"]


def test_what_a_kill_leaves_behind_is_cleared_and_done_again(store, stored_clips, make_job):
    whole = keys(store)
    # Killed between a shard and the note that its sources are done with.
    for path in Path(store, "sources").iterdir():
        path.unlink()
    assert encode_clips([str(stored_clips)], store, make_job(flips=True))["run"]["clips"] == 0
    assert keys(store) == whole
    # Killed between a shard's index and the shard, and while a file was written.
    for path in (*Path(store, "sources").iterdir(), *Path(store, "shards").glob("*.tar")):
        path.unlink()
    Path(store, "shards", ".00000-000001.1.tmp.tar").touch()
    assert encode_clips([str(stored_clips)], store, make_job(flips=True))["run"]["clips"] == 5
    assert keys(store) == whole
    assert sorted(path.name for path in Path(store, "shards").iterdir()) == ["00000-000000.parquet", "00000-000000.tar"]


def test_partly_stored_sources_are_completed(clips, make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_BYTES_HELD_OF_A_SOURCE", 0)  # clips of a source are written one by one
    taken = []

    def die_at_the_third(self, encoded, take=encode._Collector.take):
        taken.append(encoded)
        if len(taken) == 3:
            self._writer.complete()
            raise KeyboardInterrupt
        take(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(encode._Collector, "take", die_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            encode_clips([f"{clips}/a.mp4"], tmp_path / "store", make_job(batch_size=1))
    assert len(keys(tmp_path / "store")) == 2
    assert encode_clips([f"{clips}/a.mp4"], tmp_path / "store", make_job())["run"]["clips"] == 1
    assert len(keys(tmp_path / "store")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": ClipRule(frames=9, every=4, resolutions=("32x32",))}, "rule.frames was 5, is 9"),
        ({"dtype": torch.bfloat16}, "dtype was 'float16', is 'bfloat16'"),
        ({"flips": False}, "flips was True, is False"),
    ],
)
def test_stores_made_otherwise_are_not_continued(store, stored_clips, make_job, changes, message):
    with pytest.raises(StoreError, match=message):
        encode_clips([str(stored_clips)], store, make_job(**{"flips": True, **changes}))


def test_stores_of_other_weights_are_not_continued(store, stored_clips, checkpoint, make_job, tmp_path):
    vae = load_vae(checkpoint)
    with torch.no_grad():
        vae.logvar.bias += 1e-3
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(StoreError, match="checkpoint was '"):
        encode_clips([str(stored_clips)], store, make_job(flips=True, checkpoint=tmp_path / "other"))


def test_two_runs_do_not_write_at_a_time(store, stored_clips, make_job, monkeypatch):
    from leanvae.distributed import lock_folder
    from leanvae.latents import session

    lock_folder(store)
    monkeypatch.setattr(session, "lock_folder", lambda folder: lock_folder(folder, wait=0.0))
    with pytest.raises(ValueError, match=r"another run .* writes here"):
        encode_clips([str(stored_clips)], store, make_job(flips=True))


def test_other_file_systems_hold_the_same_store(store, stored_clips, make_job):
    job = make_job(flips=True)
    for _ in range(2):
        summary = encode_clips([str(stored_clips)], "memory://latents", job)
    assert (summary["clips"], summary["run"]["clips"]) == (5, 0)
    remote, local = Store("memory://latents"), Store(store)
    assert remote.manifest() == local.manifest()
    for row in remote.index().to_pylist():
        (same,) = [other for other in local.index().to_pylist() if other["key"] == row["key"]]
        assert remote.read_tensors(row)["mean"].equal(local.read_tensors(same)["mean"])
    assert not [name for name in remote.fs.find(remote.root) if ".tmp" in name]


def test_shards_are_cut_by_length(clips, make_job, tmp_path):
    summary = encode_clips([str(clips)], tmp_path / "store", make_job(), shard_bytes=1)
    assert summary["shards"] == 2, "a source's clips come into a shard together"
    assert len(keys(tmp_path / "store")) == 5


def test_statistics_are_those_of_samples(store):
    samples = []
    generator = torch.Generator().manual_seed(0)
    for name, data in members(store).items():
        if name.endswith("safetensors"):
            tensors = {key: value.double() for key, value in load(data).items()}
            noise = torch.randn(400, *tensors["mean"].shape, generator=generator, dtype=torch.float64)
            samples.append(tensors["mean"] + noise * (tensors["logvar"] / 2).exp())
    z = torch.cat(samples).transpose(0, 1).flatten(1)
    statistics = json.loads((store / "statistics.json").read_text())
    assert statistics["mean"] == pytest.approx(z.mean(1).tolist(), abs=0.02)
    assert statistics["std"] == pytest.approx(z.std(1).tolist(), rel=0.02)


def test_statistics_normalize_the_model(clips, checkpoint, make_job, tmp_path):
    load_vae(checkpoint).save_pretrained(tmp_path / "model")
    job = make_job(checkpoint=tmp_path / "model")
    encode_clips([str(clips)], tmp_path / "store", job, update_checkpoint=True)
    vae = load_vae(tmp_path / "model")
    statistics = json.loads((tmp_path / "store" / "statistics.json").read_text())
    assert list(vae.config.latent_mean) == statistics["mean"]
    assert list(vae.config.latent_std) == statistics["std"]
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.inference_mode():
        plain, normalized = vae.encode(x), vae.encode(x, normalize=True)
        mean, std = (torch.tensor(statistics[name]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        torch.testing.assert_close(normalized.mean * std + mean, plain.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(normalized.std * std, plain.std, rtol=1e-5, atol=1e-5)
        same = vae.decode(normalized.mode(), normalized.size, normalize=True)
        torch.testing.assert_close(same, vae.decode(plain.mode(), plain.size), rtol=1e-4, atol=1e-4)
    # The statistics are no part of what the store was made with.
    assert encode_clips([str(clips)], tmp_path / "store", job)["run"]["clips"] == 0


def test_models_without_statistics_do_not_normalize(checkpoint):
    with pytest.raises(ValueError, match="no latent_mean and latent_std"):
        load_vae(checkpoint).encode(torch.zeros(1, 3, 8, 8), normalize=True)


@pytest.mark.parametrize("frames", [17, 18, 7])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_long_clips_in_pieces_equal_the_whole(checkpoint, write_clip, tmp_path, monkeypatch, kind, frames):
    source = Item(str(write_clip(tmp_path / "a.mp4", num_frames=frames)), "clip")
    small = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 8, "num_res_blocks": 1}
    vae = load_vae(checkpoint) if kind == "video" else LiteVAE(LiteVAEConfig(**small)).eval()
    request = ClipRequest(ClipRule(), group=4 if kind == "video" else 1)

    def encode():
        encoder = ClipEncoder(vae, torch.float32, batch_size=1, flips=True)
        pieces = list(decode_source(source, request))
        clip, end = encoder.run(iter(pieces))
        assert isinstance(clip, EncodedClip)
        assert end == Finished(source, frames, 1, 1)
        return clip, len(pieces)

    whole, num_pieces = encode()
    assert num_pieces == 2
    monkeypatch.setattr(clips_module, "_PIXELS_AT_ONCE", 4 * 48 * 64)
    parts, num_pieces = encode()
    assert num_pieces > 2
    assert parts.times == whole.times
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=1e-5, atol=1e-5)


def test_overlapping_clips_share_frames(write_clip, tmp_path):
    source = Item(str(write_clip(tmp_path / "a.mp4", num_frames=16)), "clip")
    *pieces, end = decode_source(source, ClipRequest(ClipRule(frames=4, stride=2, every=3), group=4))
    images = [frame.image for frame in iter_frames(tmp_path / "a.mp4")]
    assert [piece.first for piece in pieces] == [0, 3, 6, 9]
    for piece in pieces:
        np.testing.assert_array_equal(piece.frames, np.stack(images[piece.first : piece.first + 7 : 2]))
    assert end == Finished(source, 16, 4, 4)
    *rest, end = decode_source(source, ClipRequest(ClipRule(frames=4, stride=2, every=3), group=4), frozenset({0, 6}))
    assert [piece.first for piece in rest] == [3, 9]
    assert end == Finished(source, 16, 4, 2)


def test_gpu_decoders_take_the_place_of_the_cpu(write_clip, tmp_path, monkeypatch):
    """A stand-in for torchcodec, which cannot be loaded without FFmpeg's libraries, with its documented interface."""
    path = write_clip(tmp_path / "a.mp4", num_frames=12)
    frames = list(iter_frames(path))

    class VideoDecoder:
        def __init__(self, source, *, device, dimension_order):
            assert (source, device, dimension_order) == (str(path), "cuda:0", "NHWC")

        def __len__(self):
            return len(frames)

        def get_frame_at(self, index):
            return SimpleNamespace(data=torch.from_numpy(frames[index].image), pts_seconds=frames[index].time)

    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(VideoDecoder=VideoDecoder))
    monkeypatch.delitem(sys.modules, "leanvae.media.nvdec", raising=False)
    source = Item(str(path), "clip", start=0.2)
    *expected, _ = decode_source(source, ClipRequest(ClipRule(frames=3), 4))
    *pieces, end = decode_source(source, ClipRequest(ClipRule(frames=3), 4, gpu="cuda:0"))
    monkeypatch.delitem(sys.modules, "leanvae.media.nvdec")
    assert end == Finished(source, 7, 2, 2)
    for piece, other in zip(pieces, expected, strict=True):
        np.testing.assert_array_equal(piece.frames, other.frames)
        assert piece.times == other.times


def test_mixed_frame_rates_are_warned_of(write_clip, make_job, tmp_path, caplog):
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "slow.mp4", num_frames=5, rate=24)
    write_clip(tmp_path / "clips" / "fast.mp4", num_frames=5, rate=60)
    encode_clips([str(tmp_path / "clips" / "slow.mp4")], tmp_path / "store", make_job())
    assert "frames a second" not in caplog.text
    encode_clips([str(tmp_path / "clips")], tmp_path / "store", make_job())
    assert "the clips have from 24 to 60 frames a second" in caplog.text


def test_names_that_are_not_utf8_cost_nobody_else(write_clip, make_job, checkpoint, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "a.mp4", num_frames=5)
    write_clip(folder / os.fsdecode(b"caf\xe9.mp4"), num_frames=5, seed=1)
    (folder / os.fsdecode(b"bad\xe9.mp4")).write_bytes(b"no video")
    summary = encode_clips([str(folder)], tmp_path / "store", make_job(ClipRule(frames=5)))
    assert (summary["clips"], summary["sources"]) == (2, 3)
    assert [entry["source"] for entry in summary["skipped"]] == [f"{folder}/bad\\udce9.mp4"]
    sources = Store(tmp_path / "store").index()["source"].to_pylist()
    assert sorted(sources) == [f"{folder}/a.mp4", f"{folder}/caf\\udce9.mp4"]
    report = verify_store(tmp_path / "store", checkpoint)
    assert report["problems"] == []
    assert len(report["samples"]) == 2


def test_folders_that_cannot_be_read_count_as_skipped(clips, make_job, tmp_path, monkeypatch):
    (clips / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    summary = encode_clips([str(clips)], tmp_path / "store", make_job())
    assert {"source": f"{clips}/locked", "reason": "Permission denied"} in summary["skipped"]


def test_anamorphic_and_transparent_clips_and_folders_are_encoded_as_they_are_shown(make_job, tmp_path):
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 180, 144, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((144, 180, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    (tmp_path / "take").mkdir()
    for number in range(5):
        cv2.imwrite(str(tmp_path / "take" / f"{number:03}.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "list.csv").write_text("path,fps\nwide.mp4,\ntake,10\n")
    encode_clips([f"{tmp_path}/list.csv"], tmp_path / "store", make_job(ClipRule()))
    facts = [json.loads(data) for name, data in members(tmp_path / "store").items() if name.endswith("json")]
    found = {Path(fact["source"]).name: (fact["size"], fact["fps"], fact["times"][-1]) for fact in facts}
    assert found == {"wide.mp4": ([5, 144, 256], 20.0, 0.2), "take": ([5, 32, 32], 10.0, 0.4)}


def test_files_that_break_off_give_no_clip(write_clip, make_job, tmp_path):
    data = write_clip(tmp_path / "whole.mkv", num_frames=60, height=96, width=128).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    summary = encode_clips([f"{tmp_path}/cut.mkv"], tmp_path / "store", make_job())
    assert summary["clips"] == 0
    assert len(summary["skipped"]) == 1


def test_dead_and_silent_decoders_cost_their_file_alone(write_clip, tmp_path):
    orders = []
    for name in ("a", "b", "c"):
        path = write_clip(tmp_path / f"{name}.mp4", num_frames=48, height=96, width=128)
        orders.append((Item(str(path), "clip"), frozenset()))
    request = ClipRequest(ClipRule(frames=4), group=4)
    outcomes = {}
    before = set(psutil.Process().children())
    # One piece waits for the caller and one for room: the decoder is at work on the file while it is held up.
    for result in decode_ahead(orders, request, num_workers=1, ahead=1, timeout=5.0):
        if isinstance(result, Piece) and result.first == 0:
            children = set(psutil.Process().children()) - before
            (decoder,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            if result.source == orders[0][0]:
                decoder.kill()
            elif result.source == orders[1][0]:
                decoder.suspend()
        if not isinstance(result, Piece):
            outcomes[Path(result.source.name).name] = result
    assert outcomes["a.mp4"].reason == "the decoder process died (exit code -9)"
    assert outcomes["b.mp4"].reason == "decoding hangs: nothing came for 5 s"
    assert isinstance(outcomes["c.mp4"], Finished)
    assert isinstance(outcomes["a.mp4"], Rejected)


def test_command_tells_of_skipped_files(checkpoint, clips, tmp_path, capsys):
    flags = ["--checkpoint", str(checkpoint), "--input", str(clips), "--output", str(tmp_path / "store")]
    flags += ["--frames", "5", "--resolution", "32x32", "--workers", "1"]
    assert main(flags, command="encode_clips") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == json.loads((tmp_path / "store" / "summary.json").read_text())
    assert len(summary["skipped"]) == 2
    assert main([*flags, "--strict"], command="encode_clips") == 3
    out, error = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["clips"] == summary["clips"]
    assert "error: 2 of 4 sources were skipped" in error
    assert main([*flags, "--frames", "9"], command="encode_clips") == 2
    assert "rule.frames was 5, is 9" in capsys.readouterr().err
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == summary["clips"]
