"""The clips and images that a command works on, and the names of what it makes of them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from leanvae.media.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from litevae.errors import InvalidInput, MissingFile


@dataclass(frozen=True)
class Job:
    """A file to reconstruct.

    Attributes:
        source: the file.
        name: its path relative to the input folder.
        target: its outputs' path relative to the output folder, without `.recon.mp4` and the like.
        is_video: whether its name says that it is a clip.
    """

    source: Path
    name: str
    target: str
    is_video: bool


def find_jobs(inputs: Path, output: Path) -> list[Job]:
    """Lists the clips and images of a folder, or one file, with a name for the outputs that no other has.

    Hidden files, files of other types, and what lies in the output folder are passed over.

    Raises:
        FileNotFoundError: there is nothing at `inputs`.
        ValueError: the folder holds no clip or image, or is the output folder.
    """
    if not inputs.exists():
        raise MissingFile(f"no file or folder at {inputs}")
    if inputs.is_dir():
        if output.resolve() == inputs.resolve():
            raise InvalidInput(f"the output folder {output} is the input folder: choose another")
        files = [
            path
            for path in sorted(inputs.rglob("*"))
            if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(inputs).parts)
            and output.resolve() not in path.resolve().parents
        ]
        if not files:
            raise InvalidInput(f"{inputs} holds no clip or image that its name shows to be one")
        names = [path.relative_to(inputs) for path in files]
    else:
        files, names = [inputs], [Path(inputs.name)]
    return [
        Job(path, name.as_posix(), target, path.suffix.lower() not in IMAGE_SUFFIXES)
        for path, name, target in zip(files, names, _unique_targets(names), strict=True)
    ]


def _unique_targets(names: list[Path]) -> list[str]:
    """Paths without suffix; files of one folder that would share one keep theirs (`a.jpg` beside `a.png`)."""
    targets = [name.with_suffix("").as_posix() for name in names]
    while True:
        count = Counter(target.casefold() for target in targets)
        clashing = [
            index
            for index, target in enumerate(targets)
            if count[target.casefold()] > 1 and target != names[index].as_posix()
        ]
        if not clashing:
            return targets
        for index in clashing:
            targets[index] = names[index].as_posix()
