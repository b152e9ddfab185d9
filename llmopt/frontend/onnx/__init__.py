"""ONNX files, raised to the dialect, and Programs that were saved as one."""
