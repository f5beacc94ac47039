"""The clips and images that a command works on, and the names of what it makes of them."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from leanvae.media.item import Item, printable
from leanvae.media.sources import list_items
from litevae.errors import InvalidInput, MissingFile


@dataclass(frozen=True)
class NamedItem:
    """A clip or image with its names.

    Attributes:
        item: the file.
        name: its path relative to the input folder.
        target: its outputs' path relative to the output folder, without `.recon.mp4` and the like.
    """

    item: Item
    name: str
    target: str

    @property
    def is_video(self) -> bool:
        """Whether it is a clip."""
        return self.item.kind == "clip"


def find_inputs(inputs: Path, output: Path) -> list[NamedItem]:
    """List the clips and images of a folder, a file, or a list of files, with names for outputs that no other has.

    Args:
        inputs: what `leanvae.media.sources.list_items` takes.
        output: the folder of the results, in which nothing is looked for.

    Raises:
        MissingFile: there is nothing at `inputs`.
        SourceError: there is no clip or image, or a list is wrongly written.
        InvalidInput: the output folder is the input folder, or a file is listed twice.
    """
    if not inputs.exists():
        raise MissingFile(f"no file or folder at {inputs}")
    if inputs.is_dir() and output.resolve() == inputs.resolve():
        raise InvalidInput(f"the output folder {output} is the input folder: choose another")
    items = list_items([str(inputs)], where="--input", without=output)
    paths = [os.path.normpath(os.path.abspath(item.path)) for item in items]
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise InvalidInput(f"{inputs} lists {repeated[0]} twice")
    root = os.path.abspath(inputs) if inputs.is_dir() else os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [printable(os.path.relpath(path, root)) for path in paths]
    return [NamedItem(*parts) for parts in zip(items, names, _unique_targets(names), strict=True)]


def first_skipped(skipped: Sequence[Mapping[str, str]], shown: int = 5) -> str:
    """Name the first of the files that were skipped, with their reasons, and how many more there are."""
    names = "; ".join(f"{entry['input']}: {entry['reason']}" for entry in skipped[:shown])
    return names + (f"; and {len(skipped) - shown} more" if len(skipped) > shown else "")


def _unique_targets(names: Sequence[str]) -> list[str]:
    """Strip paths' suffixes; files of one folder that would share a name keep theirs (`a.jpg` beside `a.png`)."""
    targets = [str(PurePosixPath(name).with_suffix("")) for name in names]
    while True:
        count = Counter(target.casefold() for target in targets)
        clashing = [
            index for index, target in enumerate(targets) if count[target.casefold()] > 1 and target != names[index]
        ]
        if not clashing:
            return targets
        for index in clashing:
            targets[index] = names[index]
