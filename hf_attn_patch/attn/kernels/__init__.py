"""Our own Triton kernels, each beside its plain-PyTorch truth."""
