"""The mathematics of AdaGRPO as pure functions: (tensors, state) -> (tensors, state).

Each formula lives once, in ``adagrpo_kernels``; this package is its public face.
"""
