"""The ONNX graph: traced without weights, simplified, written with them."""
