"""Kernels in TVMScript, one file each, chosen by the processor's features and the shape."""
