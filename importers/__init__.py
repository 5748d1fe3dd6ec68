"""Framework models to ONNX; installed as ``spa.importers``. One framework per file, imported only inside its own file."""
