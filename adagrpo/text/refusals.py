"""Reasons that several places give for refusing the same thing."""

FP8_ATTENTION = (
    "Q, K and V would be quantised in passes of their own, which cost more than FP8 attention saves; refused until the kernel "
    "that writes them quantises them"
)
TENSORWISE_FUSED = (
    "with engine.forward = fused each input would be quantised in passes of its own, which cost more than one scale per tensor "
    "saves; refused until the kernel that writes it quantises it: use rowwise, or engine.forward = compile"
)
