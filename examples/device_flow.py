"""The way to a device that builds its own plan: `python examples/device_flow.py CHECKPOINT FOLDER`.

On a workstation: export and pack. On the device: unpack, build, embed. Here both happen on one machine, and
TensorRT-RTX stands in for the device's TensorRT: on a Jetson, leave out `--target rtx`.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

checkpoint, folder = sys.argv[1], Path(sys.argv[2])
nvembed = [sys.executable, "-m", "nvembed_deploy"]
bundle = str(folder / "edge")

# On the workstation, which needs PyTorch and no GPU.
export = ["export", "--model", checkpoint, "--target", "jetson-orin", "--precision", "fp16", "--max", "8x256"]
subprocess.run([*nvembed, *export, "--out", bundle], check=True)
subprocess.run([*nvembed, "pack", bundle], check=True)  # writes edge-jetson-orin-jetpack6.tar

# On the device, which needs neither PyTorch nor the checkpoint. `build` compares the engine with PyTorch's vectors.
with tarfile.open(folder / "edge-jetson-orin-jetpack6.tar") as archive:
    archive.extractall(folder, filter="data")
device = folder / "edge-jetson-orin-jetpack6"
subprocess.run([*nvembed, "build", "bundle", "--target", "rtx"], cwd=device, check=True)
subprocess.run([*nvembed, "similarity", "bundle"], cwd=device, check=True)
