"""Quantization: calibration, smoothing, the search for what to leave out, and Q/DQ nodes."""
