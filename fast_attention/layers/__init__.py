"""Flax NNX modules: attention with its projections, feed-forward, positions, blocks."""

from fast_attention.layers.block import Block as Block
from fast_attention.layers.feed_forward import ACTIVATIONS as ACTIVATIONS
from fast_attention.layers.feed_forward import FeedForward as FeedForward
from fast_attention.layers.image import ImageLinearAttention as ImageLinearAttention
from fast_attention.layers.linear import Linear as Linear
from fast_attention.layers.linformer import LinformerAttention as LinformerAttention
from fast_attention.layers.multi_axis import MultiAxisAttention as MultiAxisAttention
from fast_attention.layers.multi_head import MultiHeadAttention as MultiHeadAttention
from fast_attention.layers.multi_head import Projection as Projection
from fast_attention.layers.multi_head import redraw as redraw
from fast_attention.layers.positions import LearnedPositions as LearnedPositions
from fast_attention.layers.positions import rotate as rotate
from fast_attention.layers.positions import sinusoids as sinusoids
