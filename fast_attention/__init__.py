"""Efficient attention for JAX and Flax: linear-time attention that drops into Flax's layers."""

from fast_attention.attention_fn import (
    make_fast_generalized_attention as make_fast_generalized_attention,
)
from fast_attention.attention_fn import make_fast_softmax_attention as make_fast_softmax_attention
from fast_attention.fast_attention_fn import FastAttention as FastAttention
from fast_attention.linear_attention import LinearAttentionState as LinearAttentionState
from fast_attention.linear_attention import linear_attention as linear_attention
from fast_attention.lsh_attention import lsh_attention as lsh_attention
from fast_attention.lsh_attention_fn import LSHAttention as LSHAttention
from fast_attention.lsh_attention_fn import make_lsh_attention as make_lsh_attention
from fast_attention.shared_qk_attention import shared_qk_attention as shared_qk_attention
from fast_attention.shared_query_key import LSHOutput as LSHOutput

__version__ = "0.1.0"
