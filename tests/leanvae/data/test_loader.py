"""Batches depend on the data, the seed and the step alone; bad files are replaced, recorded and replayed.

Most tests run three times: on clips, on image files, and on images in tars.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from itertools import chain, islice

import av
import cv2
import numpy as np
import psutil
import pytest
import torch

from leanvae.data import loader as loader_module
from leanvae.data.buckets import Shape
from leanvae.data.config import ClipDataConfig, ImageDataConfig
from leanvae.data.loader import Loader, read_first, read_held_out
from leanvae.data.order import phases_of
from leanvae.data.quarantine import QuarantineRecord, TooManyBadClips
from leanvae.data.samples import read_sample
from leanvae.data.schedule import Schedule, list_training_items
from litevae.errors import InvalidInput

NUM_STEPS = 6
BATCH = 4
STRETCHES = [(2, BATCH, (32, 32)), (3, 2 * BATCH, (16, 24)), (1, BATCH, (24, 16))]


def write_video(path, number, count=9):
    """A tiny clip whose frames show their file's number in red and their own in green."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(count):
            image = np.full((64, 64, 3), (20 * number, 20 * index, 60), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def write_image(path, number):
    """An image that shows its number in red."""
    cv2.imwrite(str(path), np.full((40, 48, 3), (60, 100, 20 * number), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources; three of fifteen files of each kind are bad."""
    folder = tmp_path_factory.mktemp("data")
    for source, count in (("one", 8), ("two", 4)):
        (folder / source).mkdir()
        for number in range(count):
            write_video(folder / source / f"good_{number}.mp4", number)
            write_image(folder / source / f"good_{number}.png", number)
    for suffix in ("mp4", "png"):
        (folder / "one" / f"empty.{suffix}").touch()
        (folder / "two" / f"text.{suffix}").write_text("no data " * 100)
    write_video(folder / "one" / "short.mp4", 1, count=3)
    png = (folder / "one" / "good_1.png").read_bytes()
    (folder / "one" / "short.png").write_bytes(png[:-20])
    for source in ("one", "two"):
        with tarfile.open(folder / f"{source}.tar", "w") as tar:
            for path in sorted((folder / source).glob("*.png")):
                tar.add(path, path.name)
    return folder


COMMON = {"num_workers": 1, "max_bad_share": 0.5, "prefetch": 1}


@pytest.fixture
def clip_config(folder):
    return ClipDataConfig(sources=[str(folder / "one"), str(folder / "two")], num_frames=5, **COMMON)


@pytest.fixture(params=["clips", "images", "tars"])
def config(request, folder, clip_config):
    if request.param == "clips":
        return clip_config
    suffix = ".tar" if request.param == "tars" else ""
    return ImageDataConfig(sources=[f"{folder}/one{suffix}", f"{folder}/two{suffix}"], **COMMON)


def has_result(pending):
    return bool(pending.task._work.buffer._messages)


clips_only = pytest.mark.parametrize("config", ["clips"], indirect=True)


def schedule(config, items=None, stretches=STRETCHES, seed=0):
    """Phases of (steps, batch size, resolution), each with one bucket."""
    frames = config.num_frames if isinstance(config, ClipDataConfig) else 1
    phases = phases_of((steps, {Shape(frames, *resolution): batch}) for steps, batch, resolution in stretches)
    return Schedule(config, items or list_training_items(config), None, phases, seed)


def batches(config, tmp_path, *, start=0, rank=0, world_size=1, stop=NUM_STEPS, seed=0):
    record = tmp_path / f"quarantine.rank{rank}.jsonl"
    with Loader(
        config,
        schedule(config, seed=seed),
        rank=rank,
        world_size=world_size,
        start_step=start,
        record=record,
    ) as loader:
        return list(islice(loader, stop - start))


def expected(step):
    """Batch size and resolution of a step."""
    return [stretch[1:] for stretch in STRETCHES for _ in range(stretch[0])][step]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.paths == b.paths
        assert a.indices == b.indices
        assert a.rejected == b.rejected
        assert torch.equal(a.pixels, b.pixels)


def test_batches_hold_clips_of_the_asked_shape_without_the_bad_ones(one_pool, clip_config, tmp_path):
    for number, step in enumerate(batches(clip_config, tmp_path)):
        size, resolution = expected(number)
        assert step.pixels.shape == (size, 3, 5, *resolution)
        assert (step.bucket, step.size) == (Shape(5, *resolution), size)
        assert step.pixels.dtype == torch.uint8
        assert step.indices == list(range(size))
        for clip, path in zip(step.pixels, step.paths, strict=True):
            assert "good" in path
            number = int(path.rsplit("_")[-1].removesuffix(".mp4"))
            assert (clip[0].float() - 20 * number).abs().mean() < 6
            green = clip[1].float().mean(dim=(1, 2))
            assert ((green.diff() - 20).abs() < 4).all()


def test_batches_hold_images_of_the_asked_shape_without_the_bad_ones(one_pool, folder, tmp_path):
    loaded = []
    for suffix in ("", ".tar"):
        config = ImageDataConfig(sources=[f"{folder}/one{suffix}", f"{folder}/two{suffix}"], **COMMON)
        steps = batches(config, tmp_path / f"as{suffix}")
        loaded.append(steps)
        for number, step in enumerate(steps):
            size, resolution = expected(number)
            assert step.pixels.shape == (size, 3, *resolution)
            assert step.pixels.dtype == torch.uint8
            assert step.pixels.is_contiguous()
            numbers = [int(path.rsplit("_")[-1].removesuffix(".png")) for path in step.paths]
            assert step.pixels[:, 0, 0, 0].tolist() == [20 * number for number in numbers]
            assert step.pixels[0, 1:, 3, 2].tolist() == [100, 60]
    for files, tars in zip(*loaded, strict=True):
        assert [path.replace("one.tar", "one").replace("two.tar", "two") for path in tars.paths] == files.paths
        assert torch.equal(files.pixels, tars.pixels)


def test_bad_files_are_replaced_within_their_source_and_say_why(one_pool, config, tmp_path):
    rejected = [rejection for step in batches(config, tmp_path) for rejection in step.rejected]
    reasons = {rejection.path.rsplit("/")[-1].split(".")[0]: rejection.reason for rejection in rejected}
    is_clips = isinstance(config, ClipDataConfig)
    assert reasons["short"] == ("too short: 3 frames, 5 needed" if is_clips else "truncated: the data end early")
    assert reasons["empty"] == "empty file"
    assert reasons["text"].startswith("cannot be decoded" if is_clips else "not an image")
    for rejection in rejected:
        source = rejection.path.rsplit("/", 1)[0]
        assert rejection.substitute.startswith(source)
        assert rejection.file == (source if source.endswith(".tar") else "")


def test_an_epoch_over_phases_takes_each_file_once(one_pool, config, tmp_path):
    """What the order names, before substitution: nothing is lost or repeated where the batch size changes."""
    named = []
    for step in batches(config, tmp_path):
        first = {rejection.position: rejection.path for rejection in step.rejected if rejection.attempt == 0}
        start = len(named)
        named += [first.get(start + index, path) for index, path in zip(step.indices, step.paths, strict=True)]
    length = len(list_training_items(config))
    assert len(named) // length == 2
    for epoch in range(2):
        assert len(set(named[epoch * length : (epoch + 1) * length])) == length


def test_a_resumed_loader_yields_what_an_undisturbed_one_does(one_pool, config, tmp_path):
    whole = batches(config, tmp_path / "a")
    # Inside each phase, at their borders, and across them.
    for start in range(1, NUM_STEPS):
        assert_same(batches(config, tmp_path / str(start), start=start), whole[start:])
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
        assert torch.equal(torch.cat([part.pixels for part in ranks]), step.pixels)


def test_rejections_are_recorded_once_and_replayed_on_any_number_of_ranks(one_pool, config, tmp_path):
    whole = batches(config, tmp_path)
    record = tmp_path / "quarantine.rank0.jsonl"
    lines = record.read_text()
    recorded = [json.loads(line) for line in lines.splitlines()]
    rejected = [rejection for step in whole for rejection in step.rejected]
    assert [entry["position"] for entry in recorded] == [rejection.position for rejection in rejected]
    assert set(recorded[0]) == {"position", "attempt", "path", "reason", "substitute", "modified", "file"}
    assert_same(batches(config, tmp_path), whole)
    assert record.read_text() == lines
    parts = [batches(config, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    assert [a.paths + b.paths for a, b in zip(*parts, strict=True)] == [step.paths for step in whole]
    assert record.read_text() == lines
    assert not (tmp_path / "quarantine.rank1.jsonl").exists()


def test_a_recorded_decision_is_replayed_though_the_file_is_good(one_pool, config, tmp_path):
    """What ran out of time once would decode today; the run must go on as it did."""
    whole = batches(config, tmp_path / "a", stop=2)
    index = 0
    path = whole[1].paths[index]
    attempt = sum(rejection.position == BATCH + index for rejection in whole[1].rejected)
    entry = {"position": BATCH + index, "attempt": attempt, "path": path}
    entry |= {"reason": "decoding took longer than 30 s", "substitute": "it is worked out again"}
    archive = path.rsplit("/", 1)[0] if ".tar/" in path else ""
    # Records of clips from before there were images have no "file".
    entry |= {"file": archive} if archive else {}
    entry["modified"] = os.stat(archive or path).st_mtime_ns
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


def test_substitutes_overtake_what_is_read_ahead(one_pool, config, tmp_path, monkeypatch):
    """A step waits for them: behind the whole queue they would hold it up, or run it out of time."""
    urgent_names = []

    def submit(function, item, *args, urgent, submit=one_pool.submit):
        urgent_names.extend([item.name] if urgent else [])
        return submit(function, item, *args, urgent=urgent)

    monkeypatch.setattr(one_pool, "submit", submit)
    rejected = [rejection for step in batches(config, tmp_path) for rejection in step.rejected]
    assert rejected
    assert sorted(urgent_names) == sorted(each.substitute for each in rejected)


@clips_only
def test_names_that_are_not_utf8_are_recorded_and_replayed(one_pool, config, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        write_video(folder / f"good_{number}.mp4", number)
    bad = folder / os.fsdecode(b"caf\xe9.mp4")
    bad.write_bytes(b"no video")
    config = ClipDataConfig(sources=[str(folder)], num_frames=5, **COMMON)
    whole = batches(config, tmp_path / "record", stop=3)
    ((path, reason),) = {(each.path, each.reason) for step in whole for each in step.rejected}
    assert path == f"{folder}/caf\\udce9.mp4"
    assert reason.startswith("cannot be decoded")
    assert QuarantineRecord(tmp_path / "record" / "quarantine.rank0.jsonl").reasons() == {path: reason}
    assert_same(batches(config, tmp_path / "record", stop=3), whole)


@clips_only
def test_a_fault_of_the_code_is_not_a_bad_file(config, tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text("def read_sample(*args):\n    yield args.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    import faulty  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(loader_module, "read_sample", faulty.read_sample)
    with (
        Loader(config, schedule(config), record=tmp_path / "quarantine.rank0.jsonl") as loader,
        pytest.raises(AttributeError, match="nothing") as caught,
    ):
        next(iter(loader))
    assert "faulty.py" in str(caught.value.__cause__)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@clips_only
def test_decoders_that_die_while_idle_are_replaced_and_no_clip_is_blamed(config, tmp_path, number):
    whole = batches(config, tmp_path / "whole")
    others = psutil.Process().children()
    record = tmp_path / "killed" / "quarantine.rank0.jsonl"
    with Loader(config, schedule(config), record=record) as loader:
        steps = iter(loader)
        got = [next(steps)]
        while not all(has_result(item) for _, step in loader._ahead for item in step):
            time.sleep(0.05)
        decoders = [child for child in psutil.Process().children() if child not in others]
        assert decoders
        for child in decoders:
            child.send_signal(number)
        time.sleep(0.5)
        got += [next(steps) for _ in range(5)]
    assert_same(got, whole)


@clips_only
def test_slow_and_crashing_decoders_are_replaced_within_the_time_limit(config, tmp_path, monkeypatch):
    (tmp_path / "odd_decoder.py").write_text(
        textwrap.dedent("""
            import os, signal, time
            from leanvae.data.samples import read_sample as read

            def read_sample(clip, config, resolution, seed):
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
                yield from read(clip, config, resolution, seed)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    import odd_decoder  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(loader_module, "read_sample", odd_decoder.read_sample)
    config = config.model_copy(update={"timeout": 0.5, "max_bad_share": 0.9, "sources": config.sources[:1]})
    record = tmp_path / "quarantine.rank0.jsonl"
    with Loader(config, schedule(config, stretches=[(1, 5, (32, 32))]), record=record) as loader:
        steps = list(islice(loader, 2))
        reasons = {path.rsplit("/")[-1]: reason for path, reason in loader.rejected_paths.items()}
    assert reasons["good_1.mp4"] == "decoding hangs: nothing came for 0.5 s"
    assert reasons["good_2.mp4"] == "the decoder process died (exit code 3)"
    assert reasons["good_3.mp4"] == "RuntimeError: unforeseen"
    assert (tmp_path / "odd_decoder.py.terminated").exists()
    assert "good_4.mp4" not in reasons
    for step in steps:
        assert not {"good_1", "good_2", "good_3"} & {path.rsplit("/")[-1][:6] for path in step.paths}


@clips_only
def test_decoder_processes_import_no_torch_and_end_with_the_loader(config, tmp_path):
    drawn = schedule(config, stretches=[(1, 2, (32, 32))])
    loader = Loader(config, drawn, record=tmp_path / "quarantine.rank0.jsonl")
    with loader:
        next(iter(loader))
        loaded = "[[n for n in ('torch', 'cv2') if n in __import__('sys').modules]]"
        assert loader._pool.submit(eval, loaded).result() == ["cv2"]
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not [thread for thread in loader._pool._supervisors if thread.is_alive()]
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(islice(loader, 5))


def test_too_many_bad_clips_stop_the_loader(one_pool, config, tmp_path):
    strict = config.model_copy(update={"max_bad_share": 0.1})
    with pytest.raises(TooManyBadClips, match=r"2 of 15 training files.*max_bad_share allows 10%:\n  .*: "):
        batches(strict, tmp_path)


def test_a_source_of_bad_clips_alone_stops_the_loader(one_pool, config, tmp_path):
    for number in range(4):
        for suffix in ("mp4", "png"):
            (tmp_path / f"{number}.{suffix}").touch()
    bad = config.model_copy(update={"max_bad_share": 1.0, "sources": ClipDataConfig(sources=[str(tmp_path)]).sources})
    with pytest.raises(TooManyBadClips, match=r"4 files tried one after another.*: empty file"):
        batches(bad, tmp_path / "record")


@clips_only
def test_loader_refuses_what_it_cannot_share(one_pool, config, tmp_path):
    record = tmp_path / "quarantine.rank0.jsonl"
    with (
        Loader(config, schedule(config), world_size=3, record=record) as loader,
        pytest.raises(ValueError, match="step 0: 4 samples of 5x32x32 cannot be shared by 3 ranks"),
    ):
        next(iter(loader))


@clips_only
def test_read_held_out_takes_central_windows_and_passes_over_bad_files(one_pool, config, caplog):
    clips = [clip for clip in list_training_items(config) if clip.source == 1][::-1]
    assert clips[0].name.endswith("text.mp4")
    samples = read_held_out(clips, config, Shape(5, 16, 24), limit=2)
    assert [sample.item for sample in samples] == clips[1:3]
    assert samples[0].frames.shape == (5, 16, 24, 3)
    assert samples[0].times == pytest.approx(np.arange(2, 7) / 30, abs=1e-3)
    assert "held out, but not used: cannot be decoded" in caplog.text
    assert len(read_held_out(clips, config, Shape(5, 16, 24), limit=100)) == 4


def test_read_held_out_reads_images(one_pool, folder, caplog):
    config = ImageDataConfig(sources=[f"{folder}/two.tar"], **COMMON)
    pictures = list_training_items(config)[::-1]
    samples = read_held_out(pictures, config, Shape(1, 16, 24), limit=2)
    assert [sample.item for sample in samples] == pictures[1:3]
    assert samples[0].frames.shape == (16, 24, 3)
    assert "two.tar/text.png: held out, but not used: not an image" in caplog.text


def test_first_samples_say_why_none_of_them_can_be_used(one_pool, folder, clip_config):
    assert len(list(read_first(schedule(clip_config), clip_config, 6))) >= 3
    config = ClipDataConfig(sources=[f"{folder}/two/text.mp4"], num_frames=5, **COMMON)
    with pytest.raises(InvalidInput, match=r"none of the first 2 samples can be used: .*text\.mp4: cannot be decoded"):
        list(read_first(schedule(config), config, 2))


def test_a_changed_tar_makes_its_records_void(one_pool, folder, tmp_path):
    shard = tmp_path / "one.tar"
    shard.write_bytes((folder / "one.tar").read_bytes())
    config = ImageDataConfig(sources=[str(shard)], **COMMON)
    batches(config, tmp_path / "run")
    record = tmp_path / "run" / "quarantine.rank0.jsonl"
    assert set(QuarantineRecord(record).reasons()) == {f"{shard}/empty.png", f"{shard}/short.png"}
    os.utime(shard, (1, 1))
    assert not QuarantineRecord(record).reasons()


def test_clips_with_a_configuration_of_images_say_so(one_pool, clip_config, tmp_path):
    with pytest.raises(TypeError, match="ClipDataConfig, got ImageDataConfig"):
        next(read_sample(list_training_items(clip_config)[0], ImageDataConfig(), Shape(5, 16, 24), None))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["raise RuntimeError('oh')", "raise KeyboardInterrupt", "pass"])
@clips_only
def test_a_program_that_leaves_the_loader_open_still_ends(config, tmp_path, ending):
    script = f"""
        from pathlib import Path
        from leanvae.data.config import ClipDataConfig

        if __name__ == "__main__":
            from leanvae.data.loader import Loader
            from leanvae.data.buckets import Shape
            from leanvae.data.order import phases_of
            from leanvae.data.schedule import Schedule, list_training_items

            config = ClipDataConfig.model_validate_json({config.model_dump_json()!r})
            record = Path({str(tmp_path)!r}) / "quarantine.rank0.jsonl"
            phases = phases_of([(1, {{Shape(5, 32, 32): 2}})])
            loader = Loader(config, Schedule(config, list_training_items(config), None, phases, 0), record=record)
            print(next(iter(loader)).pixels.shape)
            {ending}
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], timeout=60, capture_output=True, text=True, check=False
    )
    assert "torch.Size([2, 3, 5, 32, 32])" in done.stdout
    assert (done.returncode == 0) == (ending == "pass")
