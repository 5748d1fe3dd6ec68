"""Framework models to ONNX; installed as ``spa.importers``. One framework per file, imported only in its own file."""
