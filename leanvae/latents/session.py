"""Opening a store for writing: by one run at a time, with the same weights, rule and types as before."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from leanvae.distributed import LOCK_FILE, barrier, lock_folder, on_main
from leanvae.latents.encoder import VAE
from leanvae.latents.store import FORMAT, INDEX, MANIFEST, Store, StoreError, naming
from litevae.pretrained import STATISTICS_FIELDS


def hash_checkpoint(vae: VAE) -> str:
    """Compute the SHA-256 of a model's configuration, without the latents' statistics, and its stored weights."""
    digest = hashlib.sha256()
    # Without defaults, so that new fields of configurations do not change the hash.
    digest.update(vae.config.model_dump_json(exclude=STATISTICS_FIELDS, exclude_defaults=True).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def writing(store: Store, made_with: dict[str, Any]) -> Iterator[None]:
    """Keep a store open for all ranks of a run, which enter the block together.

    Args:
        store: the store.
        made_with: the properties that the store's entries must share.

    Raises:
        StoreError: the store was made with other settings; the message says which.
        InvalidInput: another run is writing to it.
    """
    descriptors: list[int] = []

    def begin() -> None:
        store.fs.makedirs(store.root, exist_ok=True)
        if store.is_local:
            with naming(store.path(LOCK_FILE)):
                descriptors.append(lock_folder(Path(store.root)))
        _prepare(store, made_with)

    try:
        on_main(begin)
        if store.is_local:
            # From here on all ranks share the lock, so that the next run waits even for a rank that outlives the
            # others.
            if not descriptors:
                descriptors.append(os.open(store.path(LOCK_FILE), os.O_RDWR | os.O_CLOEXEC))
            fcntl.flock(descriptors[0], fcntl.LOCK_SH)
        barrier()
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _prepare(store: Store, made_with: dict[str, Any]) -> None:
    made_with = {"format": FORMAT, **made_with}
    if store.exists(MANIFEST):
        differences = find_differences(store.manifest(), made_with)
        if differences:
            raise StoreError(
                f"{store.address}: made with other settings, and cannot be continued with these: {differences}; "
                "choose another --output"
            )
    else:
        store.write_json(MANIFEST, made_with)
    store.remove_leftovers()
    store.remove(INDEX)


def find_differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """List the keys in which two nested dictionaries differ, with both values."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(find_differences(old, new, f"{prefix}{key}."))
        elif old != new:
            found.append(f"{prefix}{key} was {_shortened(old)}, is {_shortened(new)}")
    return "; ".join(filter(None, found))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
