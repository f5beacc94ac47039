"""The clips and images that are evaluated: which they are, and their frames."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from leanvae.coder import same_size
from leanvae.data.cutting import Cut, cut_picture
from leanvae.jobs import Job, find_jobs
from leanvae.media.video import IMAGE_SUFFIXES, Frame, iter_frames, read_image
from litevae.errors import InvalidInput


def find_inputs(inputs: Path, output: Path) -> list[Job]:
    """Lists the clips and images of a folder, a file, or a list of files.

    Args:
        inputs: a folder, a clip or an image; or a `.txt` with a path a line, relative to its own folder, where empty
            lines and those that begin with # are passed over.
        output: the folder of the results, in which nothing is looked for.

    Raises:
        FileNotFoundError: there is nothing at `inputs`.
        ValueError: there is no clip or image, a file is listed twice, or the list is no text.
    """
    if inputs.suffix.lower() != ".txt" or not inputs.is_file():
        return find_jobs(inputs, output)
    try:
        lines = [line.strip() for line in inputs.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{inputs}: cannot be read as UTF-8 text: {error}") from error
    paths = [inputs.parent.absolute() / Path(line).expanduser() for line in lines if line and line[0] != "#"]
    paths = [Path(os.path.normpath(path)) for path in paths]
    if not paths:
        raise InvalidInput(f"{inputs} lists no file")
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise InvalidInput(f"{inputs} lists {repeated[0]} twice")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(root).as_posix() for path in paths]
    return [
        Job(path, name, name, path.suffix.lower() not in IMAGE_SUFFIXES)
        for path, name in zip(paths, names, strict=True)
    ]


def read_frames(job: Job, num_frames: int | None = None, resolution: tuple[int, int] | None = None) -> Iterator[Frame]:
    """Reads a clip or an image as models get it and as they are measured against it.

    Args:
        job: the file.
        num_frames: most frames of a clip, from its start; None takes all.
        resolution: (height, width) that frames are resized to cover and cut to, centrally; None leaves them as
            they are.

    Raises:
        MediaError: the file cannot be read, or its size changes on the way.
    """
    if not job.is_video:
        frames: Iterable[Frame] = [Frame(read_image(job.source), None, 0.0)]
    else:
        frames = same_size(islice(iter_frames(job.source), num_frames), job.source)
    for frame in frames:
        yield frame if resolution is None else replace(frame, image=cut_picture(frame.image, resolution, Cut()))
