"""Reference networks: three small trained ones (`.onnx` files here) and, in `models.builders`, a zoo for tests."""
