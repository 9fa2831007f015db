"""The ONNX graph: traced without weights, simplified, and written with them."""
