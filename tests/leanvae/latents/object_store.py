"""A file system for tests that behaves like an object store: `objects://` and a local path."""

from fsspec import AbstractFileSystem, register_implementation
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem

from leanvae.latents import LatentClips


class _Listed(LocalFileSystem):
    """A local folder that answers from cached listings; `is_down` makes every request fail."""

    is_down = False
    exists, isdir = AbstractFileSystem.exists, AbstractFileSystem.isdir  # a local folder's own ask the disk

    def __init__(self):
        super().__init__(skip_instance_cache=True)
        self.local = LocalFileSystem()
        self.listings = {}

    def ls(self, path, detail=False, **options):
        if _Listed.is_down:
            raise OSError("the network is down")
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = self.local.ls(path, detail=True)
        return self.listings[path] if detail else [entry["name"] for entry in self.listings[path]]

    def info(self, path, **options):
        path = self._strip_protocol(path)
        for entry in self.ls(self._parent(path), detail=True):
            if entry["name"] == path:
                return entry
        raise FileNotFoundError(path)

    def invalidate_cache(self, path=None):
        self.listings.clear()


class ObjectStore(AsyncFileSystemWrapper):
    """Such a folder with its own event loop, which a forked process lacks."""

    protocol = "objects"

    def __init__(self, **options):
        super().__init__(_Listed(), asynchronous=False, **options)
        self.protocol = "objects"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.removeprefix("objects://"))

    def invalidate_cache(self, path=None):
        self.sync_fs.invalidate_cache()

    @staticmethod
    def set_down(is_down):
        """Take the network down, or bring it back."""
        _Listed.is_down = is_down


class RemoteClips(LatentClips):
    """`LatentClips` whose unpickling registers the file system."""


register_implementation("objects", ObjectStore, clobber=True)
