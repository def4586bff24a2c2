"""One folder an operation: its reference, its kernels, its operators and its dispatch."""
