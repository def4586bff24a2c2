"""A cycle model of machine code: how long kernels take on GPUs that are not here."""
