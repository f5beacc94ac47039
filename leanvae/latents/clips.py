"""The clips that files are cut into for the latent store, and their decoding."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import numpy as np
from fsspec.implementations.local import make_path_posix
from numpy.typing import NDArray
from pydantic import PositiveInt, model_validator

from leanvae.data.buckets import Bucket, Shape, choose_bucket
from leanvae.data.samples import Cut, cut_picture
from leanvae.media.errors import MediaError, SourceError
from leanvae.media.folder import ClipReader, open_clip
from leanvae.media.info import Frame, VideoInfo
from leanvae.media.item import BUILTIN, Item, local_path
from leanvae.media.pool import DecoderPool
from leanvae.media.sources import list_items
from leanvae.media.worker import FileFailure, attempt
from litevae.config import StrictConfig
from litevae.errors import extra

with extra("video"):
    import cv2

_PIXELS_AT_ONCE = 2**22  # per piece; 64 frames of 256x256
_JPEG_QUALITY = 95
_NICENESS = 5  # on a CPU, frames are decoded in the time that the model leaves
_LISTS = (".txt", ".csv", ".parquet")
_NOT_UTF8 = re.compile(r"\\udc([0-9a-f]{2})")

Order = tuple[Item, frozenset[int]]  # a file, and the first frames of its clips that are not needed


def list_sources(addresses: Sequence[str], unreadable: dict[str, str] | None = None) -> list[Item]:
    """List the clips that addresses name, each part of a file once, with absolute paths.

    Args:
        addresses: as in `leanvae.media.sources.list_items`.
        unreadable: gets unreadable folders, with the reason.

    Raises:
        SourceError: an address is missing, empty or wrongly written.
    """
    absolute = [
        address if address == BUILTIN or local_path(address) is None else str(make_path_posix(local_path(address)))
        for address in addresses
    ]
    found: dict[str, Item] = {}
    for item in list_items(absolute, "clip", where="--input", unreadable=unreadable):
        if absolute[item.source].lower().endswith(_LISTS) and local_path(item.address) is not None:
            item = replace(item, address=os.path.normpath(item.address))
        found[item.id] = item
    return list(found.values())


def find_source(name: str, start: float = 0.0, end: float | None = None) -> Item:
    """Return the clip with a name, as given by `Item.name`.

    Raises:
        SourceError: it is in a tar that no longer holds it.
    """
    path = _NOT_UTF8.sub(lambda match: chr(0xDC00 + int(match[1], 16)), name)
    archive, is_in_tar, member = path.partition(".tar/")
    if is_in_tar:
        for item in list_sources([f"{archive}.tar"]):
            if item.member == member:
                return replace(item, start=start, end=end)
        raise SourceError(f"{archive}.tar: {member} is not in it")
    with suppress(SourceError):  # a folder of frames is listed
        for item in list_sources([path]):
            return replace(item, start=start, end=end)
    return Item(path, "clip", start=start, end=end)


def belongs_to(item: Item, rank: int, world_size: int) -> bool:
    """Tell whether a rank encodes a clip; each clip belongs to exactly one."""
    return int(item.id, 16) % world_size == rank


class ClipRule(StrictConfig):
    """The rule by which files become clips.

    Attributes:
        frames: frames of a clip; `None` makes one clip of each file, or of the part between `start` and `end`.
        stride: every stride-th frame of the file is used.
        every: frames of the file from the start of a clip to the start of the next; by default clips touch.
        resolutions: (height, width) that frames are resized to cover and cropped to; if there are several, each file
            uses the best fit for its shape. Without any, frames keep their size.
    """

    frames: PositiveInt | None = None
    stride: PositiveInt = 1
    every: PositiveInt | None = None
    resolutions: tuple[Bucket, ...] = ()

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.frames is None and self.every is not None:
            raise ValueError("every: each whole file is one clip; also give the frames of a clip")
        for shape in self.resolutions:
            if not shape.is_image:
                raise ValueError(f"resolutions: expected HEIGHTxWIDTH, got {shape}; 'frames' gives a clip's length")
        return self

    @property
    def span(self) -> int | None:
        """Frames of the file from a clip's first to its last; `None` for whole files."""
        return None if self.frames is None else (self.frames - 1) * self.stride + 1

    @property
    def step(self) -> int | None:
        """Frames of the file from the start of a clip to the start of the next; `None` for whole files."""
        return self.every or self.span

    def starts_at(self, index: int) -> bool:
        """Tell whether a clip begins with the file's frame of this index."""
        return index % self.step == 0 if self.step else index == 0


@dataclass(frozen=True)
class Placement:
    """The place of a clip's frames within the file's.

    Attributes:
        resolution: (height, width) of the clip in pixels.
        resized: (height, width) that the file's frames were resized to.
        crop: (top, left) of the clip in the resized frames.
    """

    resolution: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]


def place(size: tuple[int, int], resolutions: Sequence[Shape], name: str) -> Placement:
    """Choose a file's resolution, and compute the central crop of `leanvae.data.samples.cut_picture`.

    Args:
        size: (height, width) of the file's frames.
        resolutions: the rule's resolutions.
        name: name of the file, which breaks ties.
    """
    if not resolutions:
        return Placement(size, size, (0, 0))
    height, width = resolutions[choose_bucket(Shape(1, *size), resolutions, name)].resolution
    scale = max(height / size[0], width / size[1])
    resized = (max(height, round(size[0] * scale)), max(width, round(size[1] * scale)))
    return Placement((height, width), resized, ((resized[0] - height + 1) // 2, (resized[1] - width + 1) // 2))


@dataclass(frozen=True)
class ClipRequest:
    """Settings for decoder processes.

    Attributes:
        rule: how files become clips.
        group: frames of each latent frame except the first; pieces end where groups do.
        thumbnails: whether to add the first frame of each clip as JPEG.
        gpu: CUDA device to decode on; None uses the CPU.
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
        begins, ends: whether the clip begins and ends with this piece.
        fps: average frames per second of the file; None if unknown.
        source_size: (height, width) of the file's frames.
        placement: the clip's place within them.
        thumbnail: the clip's first frame as JPEG, with its first piece, if requested.
    """

    source: Item
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
    """The end of a source.

    Attributes:
        num_frames: frames in it.
        num_clips: clips in it.
        num_sent: clips that were sent.
    """

    source: Item
    num_frames: int
    num_clips: int
    num_sent: int


@dataclass(frozen=True)
class Rejected:
    """A source that cannot be used; its clips are void.

    Attributes:
        may_pass: whether it may become usable without a change of its file.
    """

    source: Item
    reason: str
    may_pass: bool = False


Decoded = Piece | Finished | Rejected


@dataclass
class _OpenClip:
    """A clip with frames still to come."""

    first: int
    wanted: bool
    num_frames: int = 0
    sent: bool = False
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def decode_ahead(
    orders: Iterable[Order], request: ClipRequest, num_workers: int, ahead: int, timeout: float
) -> Iterator[Decoded]:
    """Decode files in separate processes, in any order; see `decode_source`.

    Args:
        ahead: pieces that may wait for the caller.
        timeout: seconds that a process may be silent before it is ended, and the file rejected.
    """
    with DecoderPool(num_workers, timeout, niceness=_NICENESS) as pool:
        for order, result in pool.run(partial(_read_order, request), orders, ahead):
            yield _rejected(order[0], result) if isinstance(result, FileFailure) else result


def decode_source(source: Item, request: ClipRequest, known: frozenset[int] = frozenset()) -> Iterator[Decoded]:
    """Decode a file in this process, as `read_clips` does; errors in it become a `Rejected`."""
    for result in attempt(read_clips, source, request, known):
        yield _rejected(source, result) if isinstance(result, FileFailure) else result


def _rejected(source: Item, failure: FileFailure) -> Rejected:
    return Rejected(source, failure.reason, failure.may_pass)


def _read_order(request: ClipRequest, order: Order) -> Iterator[Piece | Finished]:
    return read_clips(order[0], request, order[1])


def read_clips(source: Item, request: ClipRequest, known: frozenset[int] = frozenset()) -> Iterator[Piece | Finished]:
    """Decode a file once, from beginning to end, and cut it into clips that may overlap.

    Args:
        known: first frames of clips to leave out.

    Yields:
        The pieces of its clips, those of each clip in order, and finally a `Finished`. Pieces of clips that do not end
        before `Finished` are void.

    Raises:
        MediaError: the file cannot be used; earlier pieces are void.
    """
    with open_clip(source) as reader:
        yield from _cut_clips(source, reader, request, known)


def _cut_clips(
    source: Item, reader: ClipReader, request: ClipRequest, known: frozenset[int]
) -> Iterator[Piece | Finished]:
    rule = request.rule
    cutter = _Cutter(source, reader.info, request)
    open_clips: list[_OpenClip] = []
    num_frames = num_clips = num_sent = 0
    for index, frame in enumerate(_frames_of(source, reader, request.gpu)):
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
        raise MediaError(source.name, f"too short: {num_frames} frames, {rule.span} needed")
    yield Finished(source, num_frames, num_clips, num_sent)


def _frames_of(source: Item, reader: ClipReader, gpu: str | None) -> Iterator[Frame]:
    path = local_path(source.address)
    # The GPU's decoder cannot make changes that a file's frames may need.
    if gpu is None or path is None or source.member or source.frames or reader.info.notes:
        return reader.frames(source.start, source.end)
    from leanvae.media.nvdec import iter_frames_on_gpu

    return iter_frames_on_gpu(path, reader.info, gpu, source.start, source.end)


class _Cutter:
    """A converter of a file's frames to the clip's size, in pieces."""

    def __init__(self, source: Item, info: VideoInfo, request: ClipRequest) -> None:
        self._source = source
        self._size = (info.height, info.width)
        self._thumbnails = request.thumbnails
        self._placement = place(self._size, request.rule.resolutions, source.name)
        self._fps = float(info.fps) if info.fps else None
        height, width = self._placement.resolution
        self._groups = max(1, _PIXELS_AT_ONCE // (height * width * request.group))
        self._group = request.group

    def cut(self, frame: Frame, index: int) -> NDArray[np.uint8]:
        """Resize and crop a frame to the clip's size.

        Raises:
            MediaError: its size differs from that of the file's first frame.
        """
        if frame.image.shape[:2] != self._size:
            height, width = frame.image.shape[:2]
            raise MediaError(
                self._source.name,
                f"the size changes from {self._size[1]}x{self._size[0]} to {width}x{height} at frame {index}",
            )
        return cut_picture(frame.image, self._placement.resolution, Cut())

    def is_full(self, clip: _OpenClip) -> bool:
        """Tell whether a clip's frames make a piece; the clip's first frame is not part of its groups."""
        return len(clip.frames) == self._groups * self._group + (0 if clip.sent else 1)

    def piece(self, clip: _OpenClip, ends: bool) -> Piece:
        """Take the frames of a clip as a piece."""
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
