"""A run in Weights & Biases, for those who ask for it."""

import importlib
import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvae.config import ConfigError
from leanvae.training.config import WandbConfig
from litevae.files import write_text

ID_FILE = "wandb_id.txt"


def check_wandb(config: WandbConfig | None) -> None:
    """Raises `ConfigError` where Weights & Biases is asked for and not installed."""
    if config and importlib.util.find_spec("wandb") is None:
        raise ConfigError("training.wandb needs the package wandb: pip install 'leanvae[wandb]', or leave it out")


class WandbRun:
    """Sends figures and reconstructions; a run that resumes goes on in the same W&B run.

    Steps that a resumed run takes again are sent again, with the same values.

    Args:
        config: where to.
        root: the run's folder, which keeps the W&B run's name.
        settings: the run's resolved configuration.
    """

    def __init__(self, config: WandbConfig, root: Path, settings: Mapping[str, Any]) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        id_file = root / ID_FILE
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4) + "\n")
        self._run = self._wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(root),
            config=dict(settings),
        )
        # W&B's own counter takes nothing for a step that it has seen, as a resumed run sends.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars by name."""
        self._run.log({"step": step, **values})

    def log_reconstructions(self, step: int, picture: NDArray[np.uint8], files: Sequence[Path]) -> None:
        """Sends a picture `(H, W, 3)` of all held-out files, and the mp4 files among those given."""
        videos = [self._wandb.Video(str(path), format="mp4") for path in files if path.suffix == ".mp4"]
        images = {"held_out/source_and_reconstruction": self._wandb.Image(picture)}
        self._run.log({"step": step, **images, **({"held_out/clips": videos} if videos else {})})

    def close(self) -> None:
        """Ends the W&B run for now."""
        self._run.finish()
