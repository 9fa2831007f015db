"""Reads the window of attention of a `config.json`, and the layers that apply it."""

from __future__ import annotations

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.family import StockClass
from nvembed_deploy.model.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(text: Fields, stock: StockClass, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """Returns the window in tokens or None, and the layers that apply it or None for all.

    Args:
        text: The fields of the decoder.
        stock: Its class, which applies the window to all layers, to some, or ignores it.
        layers: Number of its layers.

    Raises:
        CheckpointError: Fields contradict each other, or what the class computes.
    """
    if stock.name in ("Mistral", "NVEmbed") and "layer_types" in text.values:
        raise CheckpointError(
            f"{text.path}: with layer_types, transformers reads a mistral as its class Ministral, which is not "
            "supported"
        )
    layer_types = _layer_types(text, layers)
    if text.values.get("sliding_window") == 0:
        raise CheckpointError(f"{text.path}: sliding_window is 0; it must be at least 1, or null for none")
    window = text.number("sliding_window", stock.sliding_window or 0, null=0) or None
    if stock.has_layer_windows:
        return _window_of_some_layers(text, window, layer_types, layers)
    kind = SLIDING if stock.has_window and window is not None else FULL
    if layer_types is not None and set(layer_types) != {kind}:
        raise CheckpointError(
            f"{text.path}: layer_types has {', '.join(sorted(set(layer_types)))}, but with sliding_window {window} all "
            f"layers of {stock.name}Model have {kind}; correct the file"
        )
    if not stock.has_window:
        return None, None
    in_file = "sliding_window" in text.values
    text.note("window", f"{window or 'none'}: {text.path if in_file else 'default of the class, as the file has none'}")
    return window, None


def _layer_types(text: Fields, layers: int) -> list[str] | None:
    layer_types = text.values.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise CheckpointError(f"{text.path}: layer_types must list the type of each of the {layers} layers")
    if unknown := [kind for kind in layer_types if kind not in (FULL, SLIDING)]:
        raise CheckpointError(f"{text.path}: layer_types has {unknown[0]!r}, which is not supported")
    return layer_types


def _window_of_some_layers(
    text: Fields, window: int | None, layer_types: list[str] | None, layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    if not text.boolean("use_sliding_window", False):
        if layer_types is not None and SLIDING in layer_types:
            raise CheckpointError(
                f"{text.path}: layer_types has {SLIDING}, but use_sliding_window is false; correct the file"
            )
        return None, None
    if window is None:
        raise CheckpointError(f"{text.path}: use_sliding_window is true, but sliding_window is null; correct the file")
    if layer_types is None:
        windowed = tuple(range(max(text.number("max_window_layers", 28), 0), layers))
    else:
        windowed = tuple(index for index, kind in enumerate(layer_types) if kind == SLIDING)
    if not windowed:
        return None, None
    text.note("window", f"{window} in layers {', '.join(map(str, windowed))}: {text.path}")
    return window, windowed
