"""The Program: what a model is between its source and its artifact."""
