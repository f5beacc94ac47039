"""Where a command computes."""

from litevae.errors import InvalidInput


def find_device(name: str) -> str:
    """The device that a command line names.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, ...; `auto` for a GPU if there is one.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name
