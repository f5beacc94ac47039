"""Batches depend on the data, the seed and the step alone; bad clips are replaced, recorded and replayed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import chain, islice

import av
import numpy as np
import psutil
import pytest
import torch

from leanvae.data import loader as loader_module
from leanvae.data.config import DataConfig
from leanvae.data.loader import (
    ClipLoader,
    TooManyBadClips,
    check_bad_share,
    read_held_out,
)
from leanvae.data.sources import list_clips

NUM_STEPS = 6
BATCH = 4


def write_video(path, number, count=9):
    """A tiny clip whose frames show their file's number in red and their own in green."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(count):
            image = np.full((64, 64, 3), (20 * number, 20 * index, 60), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources; three of fifteen files are bad."""
    folder = tmp_path_factory.mktemp("clips")
    for source, count in (("one", 8), ("two", 4)):
        (folder / source).mkdir()
        for number in range(count):
            write_video(folder / source / f"good_{number}.mp4", number)
    (folder / "one" / "empty.mp4").touch()
    (folder / "two" / "text.mp4").write_text("no video " * 100)
    write_video(folder / "one" / "short.mp4", 1, count=3)
    return folder


@pytest.fixture(scope="module")
def pool():
    pool = loader_module._decoder_pool(1)
    yield pool
    loader_module._stop(pool)


@pytest.fixture
def one_pool(pool, monkeypatch):
    """All loaders of a test share the module's decoder process, which takes a while to start."""
    monkeypatch.setattr(loader_module, "_decoder_pool", lambda _: pool)
    monkeypatch.setattr(loader_module, "_stop", lambda _: None)


@pytest.fixture
def config(folder):
    return DataConfig(
        sources=[str(folder / "one"), str(folder / "two")],
        num_frames=5,
        resolution=(32, 32),
        num_workers=1,
        max_bad_share=0.5,
        prefetch=1,
    )


def batches(config, tmp_path, *, start=0, rank=0, world_size=1, stop=NUM_STEPS, seed=0):
    clips = list_clips(config)
    record = tmp_path / f"quarantine.rank{rank}.jsonl"
    with ClipLoader(
        config,
        clips,
        seed=seed,
        batch_size=BATCH,
        rank=rank,
        world_size=world_size,
        start_step=start,
        record=record,
    ) as loader:
        return list(islice(loader, stop - start))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.paths == b.paths
        assert a.indices == b.indices
        assert a.rejected == b.rejected
        assert torch.equal(a.clips, b.clips)


def test_batches_hold_clips_of_the_asked_shape_without_the_bad_ones(one_pool, config, tmp_path):
    steps = batches(config, tmp_path)
    for step in steps:
        assert step.clips.shape == (BATCH, 3, 5, 32, 32)
        assert step.clips.dtype == torch.uint8
        assert step.indices == [0, 1, 2, 3]
        for clip, path in zip(step.clips, step.paths, strict=True):
            assert "good" in path
            number = int(path.rsplit("_")[-1].removesuffix(".mp4"))
            assert (clip[0].float() - 20 * number).abs().mean() < 6
            green = clip[1].float().mean(dim=(1, 2))
            assert ((green.diff() - 20).abs() < 4).all()
    rejected = [rejection for step in steps for rejection in step.rejected]
    reasons = {rejection.path.rsplit("/")[-1]: rejection.reason for rejection in rejected}
    assert reasons["short.mp4"] == "too short: 3 frames, 5 needed"
    assert reasons["empty.mp4"] == "empty file"
    assert reasons["text.mp4"].startswith("cannot be decoded")
    for rejection in rejected:
        source = rejection.path.rsplit("/", 1)[0]
        assert rejection.substitute.startswith(source)


def test_a_resumed_loader_yields_what_an_undisturbed_one_does(one_pool, config, tmp_path):
    whole = batches(config, tmp_path / "a")
    assert_same(batches(config, tmp_path / "b", start=3), whole[3:])
    assert_same(batches(config, tmp_path / "a", start=1), whole[1:])
    assert any(step.rejected for step in whole[3:])


def test_seeds_change_the_batches(one_pool, config, tmp_path):
    first, second = (batches(config, tmp_path / str(seed), stop=3, seed=seed) for seed in (0, 1))
    assert [step.paths for step in first] != [step.paths for step in second]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_yield_the_batches_of_one_rank(one_pool, config, tmp_path, world_size):
    whole = batches(config, tmp_path / "whole")
    parts = [batches(config, tmp_path / "parts", rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, *ranks in zip(whole, *parts, strict=True):
        assert list(chain.from_iterable(part.paths for part in ranks)) == step.paths
        assert list(chain.from_iterable(part.indices for part in ranks)) == step.indices
        assert list(chain.from_iterable(part.rejected for part in ranks)) == step.rejected
        assert torch.equal(torch.cat([part.clips for part in ranks]), step.clips)


def test_rejections_are_recorded_once_and_replayed_on_any_number_of_ranks(one_pool, config, tmp_path):
    whole = batches(config, tmp_path)
    record = tmp_path / "quarantine.rank0.jsonl"
    lines = record.read_text()
    recorded = [json.loads(line) for line in lines.splitlines()]
    rejected = [rejection for step in whole for rejection in step.rejected]
    assert [entry["position"] for entry in recorded] == [rejection.position for rejection in rejected]
    assert set(recorded[0]) == {"position", "epoch", "attempt", "path", "reason", "substitute", "modified"}
    assert_same(batches(config, tmp_path), whole)
    assert record.read_text() == lines
    parts = [batches(config, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    assert [a.paths + b.paths for a, b in zip(*parts, strict=True)] == [step.paths for step in whole]
    assert record.read_text() == lines
    assert not (tmp_path / "quarantine.rank1.jsonl").exists()


def test_a_recorded_decision_is_replayed_though_the_clip_is_good(one_pool, config, tmp_path):
    """A clip that ran out of time once would decode today; the run must go on as it did."""
    whole = batches(config, tmp_path / "a", stop=2)
    index = 0
    path = whole[1].paths[index]
    attempt = sum(rejection.position == BATCH + index for rejection in whole[1].rejected)
    entry = {"position": BATCH + index, "epoch": 0, "attempt": attempt, "path": path}
    entry |= {"reason": "decoding took longer than 30 s", "substitute": "it is worked out again"}
    entry["modified"] = os.stat(path).st_mtime_ns
    for other in ("quarantine.rank3.jsonl", "unrelated.jsonl"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / other).write_text(json.dumps(entry) + '\n{"position": 5, "torn')
    replayed = batches(config, tmp_path / "b", stop=2)
    assert replayed[0].paths == whole[0].paths
    assert replayed[1].paths[index] != path
    assert replayed[1].paths[:index] + replayed[1].paths[index + 1 :] == (
        whole[1].paths[:index] + whole[1].paths[index + 1 :]
    )
    assert "decoding took longer than 30 s" in [rejection.reason for rejection in replayed[1].rejected]


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "quarantine.rank0.jsonl"
    path.write_text('{"position": 1, "ep')
    rejection = loader_module.Rejection(7, 0, 0, "a.mp4", "empty file", "b.mp4", -1)
    loader_module.QuarantineRecord(path).add(rejection)
    again = loader_module.QuarantineRecord(path)
    assert again.find(7, 0, "a.mp4") == rejection
    assert again.find(7, 0, "other.mp4") is None
    assert again.reasons() == {"a.mp4": "empty file"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_decoders_that_die_while_idle_are_replaced_and_no_clip_is_blamed(config, tmp_path, number):
    whole = batches(config, tmp_path / "whole", stop=6)
    others = psutil.Process().children()
    record = tmp_path / "killed" / "quarantine.rank0.jsonl"
    with ClipLoader(config, list_clips(config), seed=0, batch_size=BATCH, record=record) as loader:
        steps = iter(loader)
        got = [next(steps)]
        while not all(item.future.done() for step in loader._ahead for item in step):
            time.sleep(0.05)
        decoders = [child for child in psutil.Process().children() if child not in others]
        assert decoders
        for child in decoders:
            child.send_signal(number)
        time.sleep(0.5)
        got += [next(steps) for _ in range(5)]
    assert_same(got, whole)


def test_slow_and_crashing_decoders_are_replaced_within_the_time_limit(config, tmp_path, monkeypatch):
    (tmp_path / "odd_decoder.py").write_text(
        textwrap.dedent("""
            import os, signal, time
            from leanvae.data.clips import decode_sample as decode

            def decode_sample(clip, config, seed):
                if "good_1" in clip.path:
                    time.sleep(60)
                if "good_2" in clip.path:
                    os._exit(3)
                if "good_4" in clip.path and not os.path.exists(__file__ + ".terminated"):
                    open(__file__ + ".terminated", "w").close()
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
                if "good_3" in clip.path:
                    raise RuntimeError("unforeseen")
                return decode(clip, config, seed)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    import odd_decoder  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(loader_module, "decode_sample", odd_decoder.decode_sample)
    config = config.model_copy(update={"timeout": 0.5, "max_bad_share": 0.9, "sources": config.sources[:1]})
    clips = list_clips(config)
    record = tmp_path / "quarantine.rank0.jsonl"
    with ClipLoader(config, clips, seed=0, batch_size=5, record=record) as loader:
        steps = list(islice(loader, 2))
        reasons = {path.rsplit("/")[-1]: reason for path, reason in loader.rejected_paths.items()}
    assert reasons["good_1.mp4"] == "decoding took longer than 0.5 s"
    assert reasons["good_2.mp4"] == "the decoder process died (exit code 3)"
    assert reasons["good_3.mp4"] == "RuntimeError: unforeseen"
    assert (tmp_path / "odd_decoder.py.terminated").exists()
    assert "good_4.mp4" not in reasons
    for step in steps:
        assert not {"good_1", "good_2", "good_3"} & {path.rsplit("/")[-1][:6] for path in step.paths}


def test_decoder_processes_import_no_torch_and_end_with_the_loader(config, tmp_path):
    loader = ClipLoader(config, list_clips(config), seed=0, batch_size=2, record=tmp_path / "quarantine.rank0.jsonl")
    with loader:
        next(iter(loader))
        pool = loader._pool
        found = pool.schedule(eval, args=("[n for n in ('torch', 'cv2') if n in __import__('sys').modules]",))
        assert found.result(timeout=20) == ["cv2"]
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not pool.active
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(islice(loader, 5))


def test_too_many_bad_clips_stop_the_loader(one_pool, config, tmp_path):
    strict = config.model_copy(update={"max_bad_share": 0.1})
    with pytest.raises(TooManyBadClips, match=r"2 of 15 training files.*max_bad_share allows 10%:\n  .*mp4: "):
        batches(strict, tmp_path)


def test_a_source_of_bad_clips_alone_stops_the_loader(one_pool, config, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.mp4").touch()
    bad = config.model_copy(update={"max_bad_share": 1.0, "sources": DataConfig(sources=[str(tmp_path)]).sources})
    with pytest.raises(TooManyBadClips, match=r"4 clips tried one after another.*: empty file"):
        batches(bad, tmp_path / "record")


def test_check_bad_share_allows_the_share_and_lists_files():
    bad = {f"{n:02}.mp4": "empty file" for n in range(12)}
    check_bad_share({}, 0, 0.0)
    check_bad_share(bad, 48, 0.25)
    with pytest.raises(TooManyBadClips) as caught:
        check_bad_share(bad, 47, 0.25)
    assert "12 of 47" in str(caught.value)
    assert "  00.mp4: empty file\n" in str(caught.value)
    assert str(caught.value).endswith("and 2 more")


def test_loader_refuses_what_it_cannot_share(one_pool, config, tmp_path):
    record = tmp_path / "quarantine.rank0.jsonl"
    clips = list_clips(config)
    with pytest.raises(ValueError, match="batch size 4 cannot be shared by 3 ranks"):
        ClipLoader(config, clips, seed=0, batch_size=4, world_size=3, record=record)
    with pytest.raises(ValueError, match="two: no clips are left for training"):
        ClipLoader(config, clips[:3], seed=0, batch_size=4, record=record)


def test_read_held_out_takes_central_windows_and_passes_over_bad_files(one_pool, config, caplog):
    clips = [clip for clip in list_clips(config) if clip.source == 1][::-1]
    assert clips[0].path.endswith("text.mp4")
    samples = read_held_out(clips, config, limit=2)
    assert [sample.clip for sample in samples] == clips[1:3]
    assert samples[0].times == pytest.approx(np.arange(2, 7) / 30, abs=1e-3)
    assert "held-out clip not used: cannot be decoded" in caplog.text
    assert len(read_held_out(clips, config, limit=100)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["raise RuntimeError('oh')", "raise KeyboardInterrupt", "pass"])
def test_a_program_that_leaves_the_loader_open_still_ends(config, tmp_path, ending):
    script = f"""
        from pathlib import Path
        from leanvae.data.config import DataConfig

        if __name__ == "__main__":
            from leanvae.data.loader import ClipLoader
            from leanvae.data.sources import list_clips

            config = DataConfig.model_validate_json({config.model_dump_json()!r})
            record = Path({str(tmp_path)!r}) / "quarantine.rank0.jsonl"
            loader = ClipLoader(config, list_clips(config), seed=0, batch_size=2, record=record)
            print(next(iter(loader)).clips.shape)
            {ending}
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], timeout=60, capture_output=True, text=True, check=False
    )
    assert "torch.Size([2, 3, 5, 32, 32])" in done.stdout
    assert (done.returncode == 0) == (ending == "pass")
