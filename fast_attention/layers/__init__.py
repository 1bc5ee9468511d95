"""Flax NNX modules: attention with its projections, feed-forward, positions, blocks."""

from fast_attention.layers.block import Block as Block
from fast_attention.layers.feed_forward import ACTIVATIONS as ACTIVATIONS
from fast_attention.layers.feed_forward import FeedForward as FeedForward
from fast_attention.layers.layer_dropout import draw_layer_mask as draw_layer_mask
from fast_attention.layers.linear import Linear as Linear
from fast_attention.layers.masked_batch_norm import MaskedBatchNorm as MaskedBatchNorm
from fast_attention.layers.multi_head import MultiHeadAttention as MultiHeadAttention
from fast_attention.layers.multi_head import Projection as Projection
from fast_attention.layers.multi_head import redraw as redraw
from fast_attention.layers.norms import NORMS as NORMS
from fast_attention.layers.norms import ReZero as ReZero
from fast_attention.layers.norms import ScaleNorm as ScaleNorm
from fast_attention.layers.norms import make_norm as make_norm
from fast_attention.layers.positions import AxialPositions as AxialPositions
from fast_attention.layers.positions import LearnedPositions as LearnedPositions
from fast_attention.layers.positions import rotate as rotate
from fast_attention.layers.positions import sinusoids as sinusoids
from fast_attention.layers.product_key_memory import ProductKeyMemory as ProductKeyMemory
from fast_attention.layers.product_key_memory import is_memory_value as is_memory_value
from fast_attention.layers.reversible import residual as residual
from fast_attention.layers.reversible import reversible_residual as reversible_residual
from fast_attention.layers.token_shift import shift_tokens as shift_tokens
