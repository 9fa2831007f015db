"""The weights of a quantized graph, computed one layer at a time while the graph is written."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from nvembed_deploy.export.layerwise import LayerwiseModel, block_of
from nvembed_deploy.export.quantization.formats import QUANTIZED_SUFFIX, SCALE_SUFFIX, TENSOR_SCALE_SUFFIX
from nvembed_deploy.export.quantization.linear_groups import weight_of
from nvembed_deploy.export.quantization.record import QuantizationRecord
from nvembed_deploy.export.quantization.rounding import Rounding


class QuantizedWeights:
    """The weights of a smoothed model as a quantized graph takes them; a `WeightSource`.

    Args:
        layerwise: The smoothed model.
        record: Which layers are quantized.
        rounding: How their weights are rounded.
    """

    def __init__(self, layerwise: LayerwiseModel, record: QuantizationRecord, rounding: Rounding) -> None:
        self._layerwise = layerwise
        self._rounding = rounding
        self._stack = ExitStack()
        self._block_name = ""
        self._last: tuple[str, dict[str, Tensor]] | None = None
        """Name of the last layer that was quantized, and its tensors by their suffixes."""
        self.input_scales = {
            linear: group.input_scale for group in record.groups if not group.excluded for linear in group.linears
        }

    def _split_name(self, name: str) -> tuple[str, str]:
        """Splits the name of a quantized layer's tensor into layer and suffix; ("", "") for others."""
        for suffix in (QUANTIZED_SUFFIX, TENSOR_SCALE_SUFFIX, SCALE_SUFFIX):
            if name.endswith(f".weight{suffix}") and (linear := name.removesuffix(f".weight{suffix}")):
                return (linear, suffix) if linear in self.input_scales else ("", "")
        return "", ""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `WeightSource`."""
        linear, suffix = self._split_name(name)
        if linear:
            return self._rounding.fmt.stored_shapes(*weight_of(self._layerwise.model, linear).shape).get(suffix)
        parameter = dict(self._layerwise.model.named_parameters()).get(name)
        return None if parameter is None else tuple(parameter.shape)

    def location(self, name: str) -> None:
        """See `WeightSource`; no tensor is stored in a file as it is."""

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `WeightSource`."""
        linear, suffix = self._split_name(name)
        if (block_name := block_of(linear or name)) != self._block_name:
            self._stack.close()
            self._stack.enter_context(self._layerwise.block(block_name))
            self._block_name = block_name
        if not linear:
            tensor: Tensor = self._layerwise.model.get_parameter(name)
        else:
            if self._last is None or self._last[0] != linear:
                quantized = self._rounding.quantize(linear, weight_of(self._layerwise.model, linear))
                self._last = linear, self._rounding.fmt.to_stored(*quantized)
            tensor = self._last[1][suffix]
        return (tensor if rows is None else tensor[rows[0] : rows[1]]).cpu()

    def close(self) -> None:
        """Releases the block that is in memory."""
        self._stack.close()
        self._block_name, self._last = "", None
