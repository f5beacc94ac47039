"""What `vae.compile()` does."""

from typing import TYPE_CHECKING

from litevae.prepared import prepare

if TYPE_CHECKING:
    from leanvae.model import LeanVAE


def prepare_for_inference(vae: "LeanVAE") -> "LeanVAE":
    """Computes once, from the weights as they are now, what inference computes with; see `litevae.prepared`.

    Norms, self-modulation and the Haar transform go into the weights, widths are padded, and on CPUs with oneDNN the
    weights are packed. Results stay the same up to rounding. On GPUs `encoder` and `decoder` are also compiled, once
    for all sizes. On CPUs they are not: beside the packed products next to nothing is left to gain.
    """
    vae.eval()
    prepare(vae)
    if next(vae.parameters()).is_cuda:
        for part in (vae.encoder, vae.decoder):
            part.compile(dynamic=True)  # not fullgraph, which raises at torch's limit of recompilations
    return vae
