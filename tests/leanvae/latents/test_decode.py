"""Entries back to clips, against the reconstruction of the files; and verification of damaged stores."""

import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from leanvae import load_vae
from leanvae.cli.main import main
from leanvae.coder import FrameCoder
from leanvae.latents.clips import ClipRule
from leanvae.latents.decode import decode_entry, decode_latents
from leanvae.latents.encode import encode_clips
from leanvae.latents.store import Store, StoreError
from leanvae.latents.verify import verify_store
from leanvae.media.video import VideoReader
from litevae import LiteVAE, LiteVAEConfig


def probe(path):
    with VideoReader(str(path)) as reader:
        return reader.info


def iter_frames(path, start=0.0):
    with VideoReader(str(path)) as reader:
        yield from reader.frames(start)


@pytest.fixture
def odd_clip(tmp_path, write_clip):
    """A clip with a size and a length that patches do not divide, at a variable rate."""
    plain = write_clip(tmp_path / "plain.mp4", num_frames=11, height=50, width=70, seed=3)
    path = tmp_path / "odd.mkv"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=Fraction(24000, 1001))
        stream.width, stream.height, stream.pix_fmt = 70, 50, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(source.decode(video=0)):
            frame.pts, frame.time_base = number * 40 + 15 * (number % 3), Fraction(1, 1000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def test_entries_decode_to_the_reconstruction(odd_clip, checkpoint, make_job, tmp_path):
    encode_clips([str(odd_clip)], tmp_path / "store", make_job(ClipRule()))
    store, vae = Store(tmp_path / "store"), load_vae(checkpoint)
    (row,) = store.index().to_pylist()
    decoded = torch.cat(list(decode_entry(FrameCoder(vae), store.read_entry(row))))
    frames = np.stack([frame.image for frame in iter_frames(odd_clip)])
    x = torch.from_numpy(frames).movedim(-1, 0)[None].float() / 127.5 - 1
    with torch.inference_mode():
        y = vae.decode(vae.encode(x).mode(), (11, 50, 70))
    expected = ((y[0].movedim(0, 1) + 1) / 2).clamp(0, 1)
    assert decoded.shape == (11, 3, 50, 70)
    assert (decoded - expected).abs().max() < 1 / 255


def test_stores_become_clips_of_the_sources_times(odd_clip, checkpoint, make_job, tmp_path):
    encode_clips([str(odd_clip)], tmp_path / "store", make_job(ClipRule()))
    out = tmp_path / "out"
    assert decode_latents(checkpoint, tmp_path / "store", out) == {"decoded": 1, "present": 0}
    (path,) = out.iterdir()
    before, after = list(iter_frames(odd_clip)), list(iter_frames(path))
    times = [frame.time - before[0].time for frame in before]
    assert [frame.time for frame in after] == pytest.approx(times, abs=1e-3)
    info = probe(path)
    assert (info.width, info.height) == (70, 50)
    changed = path.stat().st_mtime_ns
    assert decode_latents(checkpoint, tmp_path / "store", out) == {"decoded": 0, "present": 1}
    assert path.stat().st_mtime_ns == changed


def test_image_models_decode_frame_by_frame(odd_clip, make_job, tmp_path):
    small = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 8, "num_res_blocks": 1}
    LiteVAE(LiteVAEConfig(**small)).save_pretrained(tmp_path / "lite")
    job = make_job(ClipRule(), checkpoint=tmp_path / "lite")
    encode_clips([str(odd_clip)], tmp_path / "store", job)
    decode_latents(tmp_path / "lite", tmp_path / "store", tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    assert len(list(iter_frames(path))) == 11


def test_single_entries_become_clips(store, checkpoint, tmp_path):
    keys = Store(store).index()["key"].to_pylist()
    assert decode_latents(checkpoint, store, tmp_path / "some", keys=keys[:2])["decoded"] == 2
    (shard,) = Path(store, "shards").glob("*.tar")
    with tarfile.open(shard) as tar:
        tar.extractall(tmp_path / "taken", filter="data")
    flags = ["--checkpoint", str(checkpoint), "--input", str(tmp_path / "taken" / f"{keys[0]}.safetensors")]
    assert main([*flags, "--output", str(tmp_path / "one")], command="decode_latents") == 0
    name = f"{keys[0]}.mp4"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "some" / name).read_bytes()
    (tmp_path / "taken" / f"{keys[0]}.json").unlink()
    assert main([*flags, "--output", str(tmp_path / "none")], command="decode_latents") == 2
    with pytest.raises(StoreError, match="no entry 'other'"):
        decode_latents(checkpoint, store, tmp_path / "some", keys=["other"])


def test_other_checkpoints_do_not_decode(store, checkpoint, tmp_path):
    vae = load_vae(checkpoint)
    with torch.no_grad():
        vae.logvar.bias += 1
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(StoreError, match="was encoded with the checkpoint"):
        decode_latents(tmp_path / "other", store, tmp_path / "out")
    with pytest.raises(StoreError, match="another checkpoint"):
        verify_store(store, tmp_path / "other")


def test_good_stores_pass(store, checkpoint, capsys):
    assert main(["store", "verify", str(store), "--checkpoint", str(checkpoint), "--samples", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["clips"], report["shards"], report["problems"]) == (5, 1, [])
    assert len(report["samples"]) == 2
    assert all(3 < sample["psnr"] < 60 for sample in report["samples"])


def damage_shard(store):
    (path,) = Path(store, "shards").glob("*.tar")
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def remove_shard(store):
    for path in Path(store, "shards").iterdir():
        path.unlink()


def remove_index(store):
    (store / "index.parquet").unlink()


def shorten_index(store):
    table = pq.read_table(store / "index.parquet")
    pq.write_table(table.slice(1), store / "index.parquet")


def copy_shard(store):
    for suffix in ("tar", "parquet"):
        path = store / "shards" / f"00000-000000.{suffix}"
        path.with_name(f"00001-000000.{suffix}").write_bytes(path.read_bytes())


def change_shard_index(store):
    path = store / "shards" / "00000-000000.parquet"
    table = pq.read_table(path)
    rows = [{**row, "latent_shape": [4, 2, 4, 5]} for row in table.to_pylist()]
    pq.write_table(type(table).from_pylist(rows, table.schema), path)


def damage_shard_index(store):
    (store / "shards" / "00000-000000.parquet").write_bytes(b"no table")


def write_other_shard_index(store):
    pq.write_table(pa.table({"key": ["a"]}), store / "shards" / "00000-000000.parquet")


def damage_index(store):
    (store / "index.parquet").write_bytes(b"no table")


def damage_sources(store):
    (store / "sources" / "00000-000000.parquet").write_bytes(b"no table")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_shard_index, "00000-000000.parquet is not a valid Parquet file"),
        (write_other_shard_index, "has other columns than the index of a shard"),
        (damage_index, "index.parquet is not a valid Parquet file"),
        (damage_sources, "sources/00000-000000.parquet is not a valid Parquet file"),
        (damage_shard, "its SHA-256 differs"),
        (remove_shard, "0 clips in the store, 3 expected"),
        (remove_index, "index.parquet is missing"),
        (shorten_index, "index.parquet is not what the shards' own indexes make together"),
        (copy_shard, "2 times in the store"),
        (change_shard_index, "mean is (4, 2, 4, 4) torch.float16, expected [4, 2, 4, 5] float16"),
    ],
)
def test_damage_is_found(store, capsys, harm, message):
    harm(store)
    assert main(["store", "verify", str(store)]) == 3
    assert any(message in problem for problem in json.loads(capsys.readouterr().out)["problems"])


def make_larger(path, write_clip):
    write_clip(path, num_frames=14, height=64, width=96)


def make_longer(path, write_clip):
    write_clip(path, num_frames=20)


def make_shorter(path, write_clip):
    write_clip(path, num_frames=11)


def make_faster(path, write_clip):
    write_clip(path, num_frames=14)
    with av.open(str(path)) as source:
        frames = list(source.decode(video=0))
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=Fraction(50))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            frame.pts = None
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


def break_off(path, write_clip):
    path.write_bytes(b"no video")


def remove(path, write_clip):
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "rule", "message"),
    [
        (make_larger, None, "has changed since it was encoded: its frames are 96x64, and were 64x48"),
        (make_longer, ClipRule(), "has changed since it was encoded: it has other frames from number 0 on"),
        (make_shorter, ClipRule(), "has changed since it was encoded: it has other frames from number 0 on"),
        (make_shorter, None, "has changed since it was encoded: it has no clip from frame 8 on"),
        (make_faster, None, "has changed since it was encoded: it has other frames from number 0 on"),
        (break_off, None, "can no longer be read: cannot be decoded"),
        (remove, None, "can no longer be read: no such file"),
    ],
)
def test_changed_sources_are_listed_and_the_rest_is_compared(
    clips, write_clip, make_job, checkpoint, tmp_path, capsys, harm, rule, message
):
    encode_clips([str(clips)], tmp_path / "store", make_job(rule) if rule else make_job())
    harm(clips / "a.mp4", write_clip)
    assert main(["store", "verify", str(tmp_path / "store"), "--checkpoint", str(checkpoint)]) == 3
    out, error = capsys.readouterr()
    report = json.loads(out)
    assert any(f"{clips}/a.mp4: {message}" in problem for problem in report["problems"]), report["problems"]
    assert all("a.mp4" in problem for problem in report["problems"])
    assert "b.mp4" in {Path(sample["source"]).name for sample in report["samples"]}
    assert error.splitlines()[-1].endswith("problems, listed above")


def test_damaged_shards_do_not_keep_the_others_from_being_compared(clips, make_job, checkpoint, tmp_path):
    encode_clips([str(clips)], tmp_path / "store", make_job(), shard_bytes=1)
    damage_first(tmp_path / "store")
    report = verify_store(tmp_path / "store", checkpoint)
    assert any("its SHA-256 differs" in problem for problem in report["problems"])
    assert report["samples"]


def damage_first(store):
    path = min(Path(store, "shards").glob("*.tar"))
    path.write_bytes(path.read_bytes()[:-1])
