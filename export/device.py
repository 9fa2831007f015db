"""Chooses where PyTorch computes during an export: on the CPU, or on a GPU as a whole or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nvembed_deploy.console import echo
from nvembed_deploy.errors import ConfigError, ExportError
from nvembed_deploy.export.forecast import Forecast
from nvembed_deploy.export.options import AUTO
from nvembed_deploy.system import GIB


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model computes."""

    device: torch.device
    whole: bool
    """True if the device holds the whole model; False if its blocks are copied there one after the other."""


ON_CPU = Placement(device=torch.device("cpu"), whole=True)


def place(requested: str, needs: Forecast, *, force: bool = False) -> Placement:
    """Chooses a device, and whether it holds the whole model.

    Args:
        requested: The value of `--device`.
        needs: The export's forecast.
        force: Whether to try although the forecast says that it will not fit.

    Raises:
        ConfigError: PyTorch has no such GPU.
        ExportError: Its memory is too small even for one layer.
    """
    if requested == "cpu" or (requested == AUTO and not torch.cuda.is_available()):
        return ON_CPU
    device = _gpu(requested)
    free = torch.cuda.mem_get_info(device)[0]
    if needs.device_whole <= free:
        return Placement(device=device, whole=True)
    if needs.device_layerwise <= free or (force and requested != AUTO):
        echo(
            f"  {device} has {free / GIB:.1f} GiB free and the whole model needs {needs.device_whole / GIB:.1f}: "
            f"computing layer by layer, in {needs.device_layerwise / GIB:.1f}"
        )
        return Placement(device=device, whole=False)
    if requested == AUTO:
        echo(f"  computing on the CPU: {device} has less than {needs.device_layerwise / GIB:.1f} GiB free")
        return ON_CPU
    raise ExportError(
        f"--device {requested} has {free / GIB:.1f} GiB of memory free, and even one layer at a time needs "
        f"{needs.device_layerwise / GIB:.1f}; free some, pass --device cpu, or --force to try"
    )


def _gpu(requested: str) -> torch.device:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device {requested}: PyTorch {torch.__version__} finds no GPU here; install a build of it for CUDA and "
            "NVIDIA's driver, or pass --device cpu"
        )
    device = torch.device("cuda" if requested == AUTO else requested)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"--device {requested}: PyTorch finds {torch.cuda.device_count()} GPUs, numbered from 0")
    return device
