"""What the GPU kernels compile to, without a GPU: ``python -m crossvit_kernels.inspect``."""
