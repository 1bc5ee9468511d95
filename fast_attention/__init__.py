"""Efficient attention for JAX and Flax: linear-time attention functions for Flax's layers."""

from fast_attention.linear import LinearAttentionState as LinearAttentionState
from fast_attention.linear import Plan as Plan
from fast_attention.linear import linear_attention as linear_attention
from fast_attention.linear.explain import explain as explain
from fast_attention.mechanisms.efficient.fn import EfficientAttention as EfficientAttention
from fast_attention.mechanisms.efficient.fn import (
    make_efficient_attention as make_efficient_attention,
)
from fast_attention.mechanisms.efficient.op import efficient_attention as efficient_attention
from fast_attention.mechanisms.favor.factories import (
    make_fast_generalized_attention as make_fast_generalized_attention,
)
from fast_attention.mechanisms.favor.factories import (
    make_fast_softmax_attention as make_fast_softmax_attention,
)
from fast_attention.mechanisms.favor.fn import FastAttention as FastAttention
from fast_attention.mechanisms.linformer.op import linformer_attention as linformer_attention
from fast_attention.mechanisms.local.fn import LocalAttention as LocalAttention
from fast_attention.mechanisms.local.fn import make_local_attention as make_local_attention
from fast_attention.mechanisms.local.op import local_attention as local_attention
from fast_attention.mechanisms.local.window import LocalWindow as LocalWindow
from fast_attention.mechanisms.lsh.exact import shared_qk_attention as shared_qk_attention
from fast_attention.mechanisms.lsh.fn import LSHAttention as LSHAttention
from fast_attention.mechanisms.lsh.fn import make_lsh_attention as make_lsh_attention
from fast_attention.mechanisms.lsh.hashed import Hashing as Hashing
from fast_attention.mechanisms.lsh.hashed import lsh_attention as lsh_attention
from fast_attention.mechanisms.lsh.operands import LSHOutput as LSHOutput
from fast_attention.mechanisms.on_mesh.fn import on_mesh as on_mesh
from fast_attention.mechanisms.strided.fn import StridedAttention as StridedAttention
from fast_attention.mechanisms.strided.fn import make_strided_attention as make_strided_attention
from fast_attention.mechanisms.strided.fn import strided_attention as strided_attention
from fast_attention.mesh.meshes import make_mesh as make_mesh
from fast_attention.softmax_attention import make_softmax_attention as make_softmax_attention

__version__ = "0.1.0"
