"""One folder per operation: its reference, kernels, operators and dispatch."""
