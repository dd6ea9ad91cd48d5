"""The Triton kernels, one module per operator; imported only when a kernel is about to run."""
