"""Weights that the package brings: their configuration, hash, size and card agree, and the card says all it must."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leanvae import LeanVAE, LeanVAEConfig, load_vae
from leanvae.cli.flags import DEFAULT_CHECKPOINT
from leanvae.config import load_config
from leanvae.named import PACKAGED, packaged_names
from leanvae.training.config import TrainImageConfig, TrainVideoConfig
from litevae.card import CARD_HEADINGS, NOT_STATED, read_card
from litevae.pretrained import CONFIG_FILE, STATISTICS_FIELDS, WEIGHTS_FILE

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 8_000_000
CARD_FIELDS = ("license", "library_name", "tags", "description", "parameters", "sha256", "training_config")


def faults(folder: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with a folder of weights, a line each."""
    found = []
    names = sorted(path.name for path in folder.iterdir())
    if names != ["README.md", CONFIG_FILE, WEIGHTS_FILE]:
        return [f"the files are {names}"]
    weights, card = folder / WEIGHTS_FILE, read_card(folder)
    found += [f"the card does not state {field}" for field in CARD_FIELDS if not card.get(field)]
    if found:
        return found
    if weights.stat().st_size > MOST_BYTES:
        found.append(f"{weights.stat().st_size} bytes, more than {MOST_BYTES}")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != card["sha256"]:
        found.append("the card has another sha256")
    vae, state = load_vae(folder), load_file(weights)
    if card["parameters"] != sum(weight.numel() for weight in vae.parameters()):
        found.append("the card has another number of parameters")
    if {value.dtype for value in state.values()} != {torch.float16}:
        found.append("not all weights are stored in float16")
    if not all(value.isfinite().all() for value in state.values()):
        found.append("not all weights are finite")
    config_class = TrainVideoConfig if isinstance(vae, LeanVAE) else TrainImageConfig
    trained = load_config(config_class, root / card["training_config"]).model
    if trained.model_dump(exclude=STATISTICS_FIELDS) != vae.config.model_dump(exclude=STATISTICS_FIELDS):
        found.append(f"{card['training_config']} describes another architecture")
    return found + card_faults(folder, card)


def card_faults(folder: Path, card: dict) -> list[str]:
    """What is wrong with the text of a card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"(?m)^## (.*)$", text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = [f"no section '{heading}'" for heading in CARD_HEADINGS if heading not in sections]
    found += [f"'{heading}' is empty" for heading, section in sections.items() if len(section.strip()) < 20]
    if NOT_STATED in text:
        found.append(f"something is '{NOT_STATED}'")
    if not re.search(r"\b20\d\d-\d\d-\d\d\b", sections.get("Date and hardware", "")):
        found.append("no date")
    if card["training_config"] not in sections.get("Commands", ""):
        found.append("the commands do not name the training configuration")
    if f"# {folder.name}\n" not in text or f'load_vae("{folder.name}")' not in text:
        found.append("the name in the text is another")
    if card["library_name"] != "leanvae" or not isinstance(card["tags"], list) or "\n" in card["description"]:
        found.append("library_name, tags or description are not as the hub or the command line need them")
    return found


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_weights_and_their_card_agree(name):
    assert faults(PACKAGED / name) == []


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_weights_are_listed_in_the_docs(name):
    assert f"`{name}`" in (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not packaged_names(), reason="the package brings no weights")
def test_default_weights_are_in_the_package():
    assert DEFAULT_CHECKPOINT in packaged_names()


@pytest.fixture
def example(tmp_path):
    """A folder without faults, and a root with its training configuration."""
    config = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1}
    (tmp_path / "configs").mkdir()
    fields = "".join(f"  {key}: {value}\n" for key, value in config.items())
    (tmp_path / "configs" / "run.yaml").write_text(f"model:\n{fields}data:\n  resolution: [64, 64]\n")
    folder = tmp_path / "lean-tiny"
    LeanVAE(LeanVAEConfig(**config)).save_pretrained(folder, torch.float16)
    card = (folder / "README.md").read_text()
    facts = "license: apache-2.0\ndescription: clips for tests\ntraining_config: configs/run.yaml\n"
    for heading in CARD_HEADINGS:
        card = card.replace(f"{heading}\n\n{NOT_STATED}", f"{heading}\n\n2026-11-26, from `configs/run.yaml`.")
    (folder / "README.md").write_text(card.replace("library_name", f"{facts}library_name"))
    return folder


def test_example_has_no_faults(example):
    assert faults(example, example.parent) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("license: apache-2.0\n", "", "does not state license"),
        ("sha256: ", "sha256: 0", "another sha256"),
        ("parameters: ", "parameters: 1", "another number of parameters"),
        ("## Limits", "## Limitations", "no section 'Limits'"),
        ("## Recipe\n\n2026-11-26, from `configs/run.yaml`.", "## Recipe\n\n", "'Recipe' is empty"),
        ("## Recipe\n\n", f"## Recipe\n\n{NOT_STATED} ", "something is"),
        ("Date and hardware\n\n2026-11-26", "Date and hardware\n\nyesterday", "no date"),
        ("Commands\n\n2026-11-26, from `configs/run.yaml`", "Commands\n\nsome other command", "do not name"),
        ('load_vae("lean-tiny")', 'load_vae("lean-large")', "name in the text"),
    ],
)
def test_faults_of_a_card_are_found(example, old, new, fault):
    text = (example / "README.md").read_text()
    assert text.count(old) == 1
    (example / "README.md").write_text(text.replace(old, new))
    assert fault in "; ".join(faults(example, example.parent))


def test_faults_of_weights_are_found(example):
    root = example.parent
    vae = load_vae(example)
    with torch.no_grad():
        vae.logvar.bias[0] = float("nan")
    vae.save_pretrained(example)
    assert faults(example, root) == ["not all weights are stored in float16", "not all weights are finite"]
    (root / "configs" / "run.yaml").write_text("model:\n  low_channels: 16\n")
    assert "configs/run.yaml describes another architecture" in faults(example, root)
    (example / "notes.txt").write_text("")
    assert "notes.txt" in faults(example, root)[0]


def test_size_of_weights_is_bounded(example, monkeypatch):
    monkeypatch.setitem(globals(), "MOST_BYTES", 1000)
    assert "more than 1000" in faults(example, example.parent)[0]
