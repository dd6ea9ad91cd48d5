"""Reasons that several places give for refusing the same thing."""

FP8_ATTENTION = (
    "Q, K and V would be quantised in passes of their own, which cost more than FP8 attention saves; refused until the kernel "
    "that writes them quantises them"
)
TENSORWISE_FUSED = (
    "with engine.forward = fused each input would be quantised in passes of its own, which cost more than one scale per tensor "
    "saves; refused until the kernel that writes it quantises it: use rowwise, or engine.forward = compile"
)
_SKIP_LAYER = (
    "skip-layer guidance is not supported: it would be a third row of the transformer for every image, which neither rollouts "
    "nor the update have; remove it, in evaluation too"
)
_TRUE_CFG = (
    "classifier-free guidance of FLUX models is not supported, theirs is an embedding of the transformer, whose scale is "
    "model.guidance"
)

UNSUPPORTED = {
    "skip_guidance_layers": _SKIP_LAYER,
    "skip_layer_guidance_scale": _SKIP_LAYER,
    "skip_layer_guidance_start": _SKIP_LAYER,
    "skip_layer_guidance_stop": _SKIP_LAYER,
    "skip_layer_guidance": _SKIP_LAYER,
    "true_cfg_scale": _TRUE_CFG,
}
"""Names that users of diffusers may expect as keys of a recipe, in any table, and why there is no such key."""
