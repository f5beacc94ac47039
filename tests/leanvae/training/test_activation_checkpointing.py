"""Activation checkpointing: the same gradients, from fewer tensors kept for the backward pass."""

import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.training.config import TrainVideoConfig
from litevae import LiteVAE, LiteVAEConfig
from litevae.recompute import recompute_activations

SMALL_LEAN = {"low_channels": 8, "high_channels": 24, "num_fusion_layers": 2}
SMALL_LITE = {f"{part}_channels": 8 for part in ("extraction", "aggregation", "decoder", "encoder")}
MODELS = {
    "lean": lambda: LeanVAE(LeanVAEConfig(**SMALL_LEAN)),
    "lean smc": lambda: LeanVAE(LeanVAEConfig(**SMALL_LEAN, decoder_norm="smc")),
    "lite": lambda: LiteVAE(LiteVAEConfig(**SMALL_LITE)),
    "lite naf vit": lambda: LiteVAE(
        LiteVAEConfig(**SMALL_LITE, extraction="naf", aggregation="vit", vit_grid=(4, 4), decoder_norm="smc")
    ),
    "sd": lambda: LiteVAE(LiteVAEConfig(**SMALL_LITE, encoder="sd")),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if not parameter.any():  # scales and gains that start at 0 would hide a part from the gradients
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_of(model):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 5, 32, 32) if isinstance(model, LeanVAE) else (2, 3, 32, 32)
    x = 2 * torch.rand(shape, generator=generator) - 1
    output, posterior = model(x)
    return (output - x).square().mean() + 1e-4 * posterior.kl().mean()


def gradients(model):
    loss_of(model).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def kept_bytes(model):
    """Memory of everything that the forward pass saves for the backward one, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_with_less_memory(name):
    plain, recomputing = make(name), make(name)
    recompute_activations(recomputing)
    expected, found = gradients(plain), gradients(recomputing)
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert kept_bytes(recomputing) < 0.5 * kept_bytes(plain)


def test_inference_is_left_as_it_is():
    plain, recomputing = make("lean smc").eval(), make("lean smc").eval()
    recompute_activations(recomputing)
    with torch.no_grad():
        assert torch.equal(loss_of(plain), loss_of(recomputing))


def test_deepspeeds_own_block_is_refused():
    with pytest.raises(ValueError, match=r"activation_checkpointing is set by training\.activation_checkpointing"):
        TrainVideoConfig.model_validate({"deepspeed": {"activation_checkpointing": {"cpu_checkpointing": True}}})
