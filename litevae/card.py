"""Model cards: a README.md beside weights, with a YAML front matter as the Hugging Face hub reads it."""

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from litevae.config import AutoencoderConfig
from litevae.files import write_text
from litevae.pretrained import WEIGHTS_FILE

CARD_FILE = "README.md"
CARD_HEADINGS = ("Data and licences", "Recipe", "Commands", "Date and hardware", "Figures", "Limits")
NOT_STATED = "Not stated."

_TEMPLATE = """\
---
library_name: leanvae
tags:
- autoencoder
- vae
- wavelet
- latent-diffusion
parameters: {parameters}
sha256: {sha256}
---

# {title}

Weights of a {model} autoencoder with {channels} latent channels. `sha256` is the hash of `{weights}`.

```python
from leanvae import load_vae

vae = load_vae("{title}")  # the path of this folder, or its name on the Hugging Face hub
```
"""


def write_card(folder: str | Path, vae: nn.Module, config: AutoencoderConfig) -> None:
    """Write a card for a folder of weights, with a heading for each fact that its author has to add.

    A card that is there already stays as it is, except that `parameters` and `sha256` in its front matter are brought
    up to date.

    Args:
        folder: where the weights have just been saved.
        vae: the autoencoder.
        config: its configuration.
    """
    file = Path(folder, CARD_FILE)
    with Path(folder, WEIGHTS_FILE).open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    facts = {"parameters": sum(weight.numel() for weight in vae.parameters()), "sha256": sha256}
    if file.exists():
        head, rule, body = file.read_text(encoding="utf-8").partition("\n---\n")
        for key, value in facts.items():
            head = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", head)
        text = head + rule + body
    else:
        text = _TEMPLATE.format(
            title=Path(folder).resolve().name,
            model=type(vae).__name__,
            channels=config.latent_channels,
            weights=WEIGHTS_FILE,
            **facts,
        )
        text += "".join(f"\n## {heading}\n\n{NOT_STATED}\n" for heading in CARD_HEADINGS)
    write_text(file, text)


def read_card(folder: str | Path) -> dict[str, Any]:
    """Return the front matter of a folder's card; empty if there is no card, or none that can be read."""
    file = Path(folder, CARD_FILE)
    if not file.is_file():
        return {}
    opening, _, rest = file.read_text(encoding="utf-8").partition("---\n")
    head, rule, _ = rest.partition("\n---\n")
    try:
        fields = yaml.safe_load(head) if rule and not opening else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}
