"""Attention: for training (flash_attention) and for generation (decode_attention).

defines:
    api.py        flash_attention: validation, the registered operators, dispatch
    projected.py  projected_attention: RoPE and attention of a fused projection
    decode.py     decode_attention: the newest tokens against a cache; decode_kernel.py in Triton
    forward.py    Triton forward kernel and its launcher
    gluon_forward.py  the forward in Gluon, for Hopper; nothing chooses it yet
    gluon_backward.py  the backward in Gluon, launcher of gluon_dkdv.py and gluon_dq.py; nor this
    gluon_tiles.py  what the kernels in Gluon share
    backward.py   Triton backward kernels (dq, then dk and dv) and their launcher
    tiles.py      tile sizes, and which keys a row sees: shared by the kernels
    cpu.py        the same in C++ for the CPU
    aten.py       the same op from ATen's CPU flash kernels, document by document, block by block
"""

from stellarator_kernels.attention.api import flash_attention
from stellarator_kernels.attention.decode import decode_attention
from stellarator_kernels.attention.projected import projected_attention

__all__ = ["decode_attention", "flash_attention", "projected_attention"]
