"""Products of activations with weights."""
