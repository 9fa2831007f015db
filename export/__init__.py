"""The build side: checkpoint to ONNX to plan to bundle, with a parity gate at each hop. Needs the extra `export`."""
