"""Model cards beside weights."""

import hashlib

import pytest
import torch
import yaml

from litevae import LiteVAE, LiteVAEConfig
from litevae.card import CARD_HEADINGS, NOT_STATED, read_card
from litevae.errors import InvalidInput
from litevae.pretrained import WEIGHTS_FILE

LITE = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 8, "num_res_blocks": 1}


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return LiteVAE(LiteVAEConfig(latent_channels=12, **LITE))


def sha256(folder):
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def test_card_states_what_is_known_and_asks_for_the_rest(tmp_path, vae):
    vae.save_pretrained(tmp_path / "mine")
    facts = read_card(tmp_path / "mine")
    assert facts["library_name"] == "leanvae"
    assert facts["parameters"] == sum(weight.numel() for weight in vae.parameters())
    assert facts["sha256"] == sha256(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine\n" in text
    assert "LiteVAE autoencoder with 12 latent channels" in text
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(CARD_HEADINGS)
    assert text.count(NOT_STATED) == len(CARD_HEADINGS)


def test_card_that_is_there_keeps_its_text_but_no_old_figures(tmp_path, vae):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ndescription: 'faces: at 256x256'\nsha256: 0\n---\n# Mine\n\nsha256: as above\n---\nend\n"
    )
    vae.save_pretrained(tmp_path)
    head, body = f"license: mit\ndescription: 'faces: at 256x256'\nsha256: {sha256(tmp_path)}\n", "sha256: as above\n"
    assert (tmp_path / "README.md").read_text() == f"---\n{head}---\n# Mine\n\n{body}---\nend\n"
    assert read_card(tmp_path) == yaml.safe_load(head)
    (tmp_path / "README.md").write_text("# Without front matter\n")
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Without front matter\n"


@pytest.mark.parametrize("text", ["", "# Mine\n---\na: 1\n---\n", "---\n[a\n---\n", "---\n- a\n---\n", "---\na: 1\n"])
def test_card_without_readable_front_matter_states_nothing(tmp_path, text):
    assert read_card(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == {}


def test_weights_are_stored_in_the_type_that_is_asked_for(tmp_path, vae):
    vae.save_pretrained(tmp_path / "whole")
    vae.save_pretrained(tmp_path / "half", torch.float16)
    assert {weight.dtype for weight in vae.parameters()} == {torch.float32}
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_weights_that_a_type_cannot_hold_are_refused(tmp_path, vae):
    name, weight = next(iter(vae.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] = 1e6
    with pytest.raises(InvalidInput, match=rf"^{name} reaches 1e\+06, which torch.float16 cannot hold"):
        vae.save_pretrained(tmp_path, torch.float16)
    vae.save_pretrained(tmp_path, torch.bfloat16)
