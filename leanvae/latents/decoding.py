"""A file's clips as they are decoded: frames of the rule's size, in pieces that bound the memory they take."""

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from leanvae.data.cutting import Cut, cut_picture
from leanvae.data.decoding import read_frame_table
from leanvae.data.sources import Clip
from leanvae.latents.rule import ClipRule, Placement, place
from leanvae.latents.sources import Source
from leanvae.media.errors import MediaError
from leanvae.media.video import TIME_SLACK, Frame, VideoInfo, iter_frames
from litevae.errors import extra

with extra("video"):
    import cv2

_PIXELS_AT_ONCE = 2**22  # of a piece; 64 frames of 256x256
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Decoding:
    """What decoder processes need to know.

    Attributes:
        rule: how files become clips.
        group: frames that each latent frame but the first stands for; pieces end where groups do.
        thumbnails: whether the first frame of each clip is also wanted as JPEG.
        gpu: device whose own decoder shall decode, if one shall.
    """

    rule: ClipRule
    group: int
    thumbnails: bool = False
    gpu: str | None = None


@dataclass(frozen=True)
class Piece:
    """The next frames of a clip.

    Attributes:
        source: the file, or the part of it, that the clip is cut from.
        first: index of the clip's first frame in it.
        frames: (t, H, W, 3) uint8, full-range RGB.
        times: (t,) seconds since the file's start.
        begins, ends: whether the clip begins and ends with it.
        fps: frames of the file a second, on average, or None where unknown.
        source_size: (height, width) of the file's pictures.
        placement: where the clip's pictures lie in them.
        thumbnail: the clip's first frame as JPEG, with its first piece, if wanted.
    """

    source: Source
    first: int
    frames: NDArray[np.uint8]
    times: list[float]
    begins: bool
    ends: bool
    fps: float | None
    source_size: tuple[int, int]
    placement: Placement
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Finished:
    """A source has been read to its end.

    Attributes:
        num_frames: frames in it.
        num_clips: clips in it.
        num_sent: of these, clips that were wanted.
    """

    source: Source
    num_frames: int
    num_clips: int
    num_sent: int


@dataclass(frozen=True)
class Rejected:
    """A source cannot be used, and none of its clips shall be.

    Attributes:
        may_pass: whether it may be usable another time, although its file stays as it is.
    """

    source: Source
    reason: str
    may_pass: bool = False


Decoded = Piece | Finished | Rejected


@dataclass
class _OpenClip:
    """A clip whose frames are still coming."""

    first: int
    wanted: bool
    num_frames: int = 0
    sent: bool = False
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def decode_source(source: Source, decoding: Decoding, known: frozenset[int] = frozenset()) -> Iterator[Decoded]:
    """Decodes a source once, from its beginning to its end, and cuts it into clips that may overlap.

    Args:
        known: first frames of the clips that need not be yielded.

    Yields:
        The pieces of its clips, those of each clip in order, and at the end one `Finished` or `Rejected`. After a
        `Rejected`, pieces that came before are void; so are those of clips that do not end before `Finished`.
    """
    try:
        with _as_file(source) as path:
            yield from _decode_file(source, path, decoding, known)
    except MediaError as error:
        yield Rejected(source, error.reason)
    except Exception as error:
        # Whatever else a file makes the decoders or the network do, it must not end the run; it is listed.
        yield Rejected(source, f"{type(error).__name__}: {error}", may_pass=True)
    finally:
        gc.collect()  # PyAV's containers stand in reference cycles, and hold their frames until then


@contextmanager
def _as_file(source: Source) -> Iterator[str]:
    """The path of a source's file, fetched to a temporary one unless it is local."""
    path = source.local_path()
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
        name = (source.member or source.address).partition("::")[0]
        path = os.path.join(folder, "clip" + PurePosixPath(name).suffix)
        with open(path, "wb") as file:
            file.write(source.read())
        yield path


def _decode_file(source: Source, path: str, decoding: Decoding, known: frozenset[int]) -> Iterator[Decoded]:
    rule = decoding.rule
    table = read_frame_table(Clip(path, source.start, source.end))  # refuses files that are cut short
    cutter = _Cutter(source, table.info, decoding)
    open_clips: list[_OpenClip] = []
    num_frames = num_clips = num_sent = 0
    for index, frame in enumerate(_frames_of(source, table.info, decoding.gpu)):
        if rule.starts_at(index):
            open_clips.append(_OpenClip(index, index not in known))
        image = cutter.cut(frame, index) if any(clip.wanted for clip in open_clips) else None
        for clip in list(open_clips):
            if (index - clip.first) % rule.stride:
                continue
            clip.num_frames += 1
            if clip.wanted:
                assert image is not None
                if cutter.is_full(clip):
                    yield cutter.piece(clip, ends=False)
                clip.frames.append(image)
                clip.times.append(round(frame.time, 6))
            if clip.num_frames == rule.frames:
                open_clips.remove(clip)
                num_clips += 1
                num_sent += clip.wanted
                if clip.wanted:
                    yield cutter.piece(clip, ends=True)
        num_frames += 1
    if rule.frames is None:
        for clip in open_clips:
            num_clips += 1
            num_sent += clip.wanted
            if clip.wanted:
                yield cutter.piece(clip, ends=True)
    if not num_clips:
        raise MediaError(path, f"too short: {num_frames} frames, {rule.span} needed")
    yield Finished(source, num_frames, num_clips, num_sent)


def _frames_of(source: Source, info: VideoInfo, gpu: str | None) -> Iterator[Frame]:
    if gpu is None:
        frames = iter_frames(info.path, source.start, threads=1)
    else:
        from leanvae.media.nvdec import iter_frames_on_gpu

        frames = iter_frames_on_gpu(info, gpu, source.start)
    if source.end is None:
        return frames
    end = source.end - TIME_SLACK
    return takewhile(lambda frame: frame.time < end, frames)


class _Cutter:
    """Brings a file's pictures to the clip's size, and packs them into pieces."""

    def __init__(self, source: Source, info: VideoInfo, decoding: Decoding) -> None:
        self._source = source
        self._size = (info.height, info.width)
        self._thumbnails = decoding.thumbnails
        self._placement = place(self._size, decoding.rule.resolutions, source.name)
        self._fps = float(info.fps) if info.fps else None
        height, width = self._placement.resolution
        self._groups = max(1, _PIXELS_AT_ONCE // (height * width * decoding.group))
        self._group = decoding.group

    def cut(self, frame: Frame, index: int) -> NDArray[np.uint8]:
        """A frame at the clip's size.

        Raises:
            MediaError: its size is not that of the file's first frame.
        """
        if frame.image.shape[:2] != self._size:
            height, width = frame.image.shape[:2]
            raise MediaError(
                self._source.name,
                f"the size changes from {self._size[1]}x{self._size[0]} to {width}x{height} at frame {index}",
            )
        return cut_picture(frame.image, self._placement.resolution, Cut())

    def is_full(self, clip: _OpenClip) -> bool:
        """Whether what is held of a clip makes a piece; the clip's first frame stands outside its groups."""
        return len(clip.frames) == self._groups * self._group + (0 if clip.sent else 1)

    def piece(self, clip: _OpenClip, ends: bool) -> Piece:
        """Takes what is held of a clip."""
        piece = Piece(
            self._source,
            clip.first,
            np.stack(clip.frames),
            clip.times,
            begins=not clip.sent,
            ends=ends,
            fps=self._fps,
            source_size=self._size,
            placement=self._placement,
        )
        if self._thumbnails and piece.begins:
            piece = replace(piece, thumbnail=_to_jpeg(piece.frames[0]))
        clip.frames, clip.times, clip.sent = [], [], True
        return piece


def _to_jpeg(image: NDArray[np.uint8]) -> bytes:
    encoded, data = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    assert encoded
    return data.tobytes()
