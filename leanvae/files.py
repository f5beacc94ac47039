"""Writing of files that matter: complete or not at all."""

from litevae.files import atomic_path, flush_to_disk, write_text

__all__ = ["atomic_path", "flush_to_disk", "write_text"]
