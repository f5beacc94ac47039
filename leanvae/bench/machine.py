"""The machine and its software, recorded with every result."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("leanvae", "torch", "diffusers", "numpy")


def machine_facts(device: str) -> dict[str, Any]:
    """Return the hardware and software that affect the figures, without names of hosts or users."""
    hardware: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting_threads": os.environ.get("OMP_WAIT_POLICY", "default").lower(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": properties.name, "memory_bytes": properties.total_memory}
    software = {name: _version(name) for name in _PACKAGES}
    software |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return {"hardware": hardware, "software": software}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
