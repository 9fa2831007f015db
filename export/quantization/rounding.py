"""How the weights of quantized layers are rounded: to the nearest value, or by GPTQ.

The nearest values follow from the weights, and are computed again each time that they are needed. GPTQ's follow from
the calibration too and take longer, so they are stored: one file a layer, as a model may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.quantization.formats import FORMATS, NumberFormat
from nvembed_deploy.export.quantization.gptq import gptq
from nvembed_deploy.export.quantization.linear_groups import weight_of
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.spec import Precision


class Rounding:
    """Rounds each weight to the nearest value.

    Args:
        fmt: The number format.
    """

    def __init__(self, fmt: NumberFormat) -> None:
        self.fmt = fmt

    def quantize(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes the weight of a linear layer.

        Args:
            name: Module name of the layer.
            weight: float32 [out, in], smoothed.

        Returns:
            See `NumberFormat.quantize_weight`.
        """
        return self.fmt.quantize_weight(weight)

    def fake_quantize(self, name: str, weight: Tensor) -> Tensor:
        """Quantizes and dequantizes the weight of a linear layer."""
        return self.fmt.dequantize_weight(*self.quantize(name, weight))


class GptqRounding(Rounding):
    """Rounds weights by GPTQ, once, and keeps the results in files.

    Args:
        fmt: The number format.
        folder: Where the results are stored; it is created.
    """

    def __init__(self, fmt: NumberFormat, folder: Path) -> None:
        super().__init__(fmt)
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def fit(self, name: str, weight: Tensor, hessian: Tensor) -> None:
        """Rounds the weight of a linear layer and stores the result.

        Args:
            name: Module name of the layer.
            weight: float32 [out, in], smoothed.
            hessian: float32 [in, in], of the smoothed inputs; see `gptq`.

        Raises:
            ExportError: The Hessian is not finite.
        """
        scale = self.fmt.weight_scale(weight, importance=hessian.diagonal())
        try:
            quantized = gptq(weight, hessian, scale, self.fmt)
        except ArithmeticError as err:
            raise ExportError(
                f"inputs of {name} overflow FP32 on the calibration texts ({err}): the checkpoint is damaged, or its "
                "training diverged; download it again, or export an earlier one"
            ) from err
        self._save(name, quantized, scale)

    def quantize(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what `fit` stored; see `Rounding`."""
        tensors = load_file(self._path(name), device=str(weight.device))
        return self.fmt.unpack(tensors["packed"]).reshape(weight.T.shape), tensors["scale"]

    def copy_from(self, graph: Path, model: NVEmbed, linears: Iterable[str]) -> None:
        """Stores the quantized weights of an earlier graph.

        Args:
            graph: The graph, with its weights beside it.
            model: The model, for the sizes of its layers.
            linears: Module names of the quantized layers.

        Raises:
            ValueError: The graph has no such weight, or one of another size.
        """
        initializers = onnx.load(graph, load_external_data=False).graph.initializer
        tensors = {tensor.name: tensor for tensor in initializers}
        for name in linears:
            stored = {}
            for suffix, shape in self.fmt.stored_shapes(*weight_of(model, name).shape).items():
                tensor = tensors.get(f"{name}.weight{suffix}")
                if tensor is None or tuple(tensor.dims) != shape:
                    found = "missing" if tensor is None else f"of size {list(tensor.dims)}"
                    raise ValueError(f"{name}.weight{suffix} is {found} instead of {list(shape)}")
                array = onnx.numpy_helper.to_array(tensor, str(graph.parent))
                stored[suffix] = torch.from_numpy(array.astype(np.float32))
            self._save(name, *self.fmt.from_stored(stored))

    def _save(self, name: str, quantized: Tensor, scale: Tensor) -> None:
        tensors = {"packed": self.fmt.pack(quantized).cpu(), "scale": scale.cpu().contiguous()}
        save_file(tensors, self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def rounding_of(precision: Precision, folder: Path) -> Rounding:
    """Returns the rounding of a precision's weights.

    Args:
        precision: A quantized precision.
        folder: Where the results are stored if they do not follow from the weights.
    """
    fmt = FORMATS[precision]
    return GptqRounding(fmt, folder) if fmt.gptq else Rounding(fmt)
