"""Quantization: schemes, numerics on arrays, packing, precision plans, measured quality."""
