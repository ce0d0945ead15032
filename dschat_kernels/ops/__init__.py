"""The ops, one file each: signature, checks, formula, PyTorch reference, torch.library registration.

Names are imported when they are first used, as in `dschat_kernels` itself: `dschat_kernels.ops.rms_norm` is
the module, `dschat_kernels.rms_norm` the function.
"""
