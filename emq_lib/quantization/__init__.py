"""Quantization: choosing bits, quantizing any network, learned rounding, packed files, ONNX."""
