"""Flax NNX modules: attention with its projections, feed-forward, positions, blocks."""

from fast_attention.layers.attention.calibration import calibrate as calibrate
from fast_attention.layers.attention.calibration import (
    query_key_moments as query_key_moments,
)
from fast_attention.layers.attention.calibration import recalibrate as recalibrate
from fast_attention.layers.attention.config import AttentionConfig as AttentionConfig
from fast_attention.layers.attention.config import HeadGroup as HeadGroup
from fast_attention.layers.attention.decay import HeadDecay as HeadDecay
from fast_attention.layers.attention.decay import decay_slopes as decay_slopes
from fast_attention.layers.attention.fidelity import LayerFidelity as LayerFidelity
from fast_attention.layers.attention.fidelity import fidelity_sums as fidelity_sums
from fast_attention.layers.attention.fidelity import measure_fidelity as measure_fidelity
from fast_attention.layers.attention.fidelity import (
    summarize_fidelity as summarize_fidelity,
)
from fast_attention.layers.attention.linformer import (
    LinformerAttention as LinformerAttention,
)
from fast_attention.layers.attention.linformer import LinformerConfig as LinformerConfig
from fast_attention.layers.attention.multi_axis import (
    MultiAxisAttention as MultiAxisAttention,
)
from fast_attention.layers.attention.multi_head import (
    MultiHeadAttention as MultiHeadAttention,
)
from fast_attention.layers.attention.query_key_norm import UnitQueryKey as UnitQueryKey
from fast_attention.layers.attention.redrawing import fix_projections as fix_projections
from fast_attention.layers.attention.redrawing import redraw as redraw
from fast_attention.layers.attention.redrawing import redraw_due as redraw_due
from fast_attention.layers.attention.redrawing import redraw_every as redraw_every
from fast_attention.layers.attention.stored_projections import Projection as Projection
from fast_attention.layers.attention.stored_projections import (
    RunningMoments as RunningMoments,
)
from fast_attention.layers.attention.switch import with_attention as with_attention
from fast_attention.layers.attention.transfer import linearize as linearize
from fast_attention.layers.attention.transfer import output_errors as output_errors
from fast_attention.layers.attention.transfer import transfer_loss as transfer_loss
from fast_attention.layers.feed_forward import ACTIVATIONS as ACTIVATIONS
from fast_attention.layers.feed_forward import FeedForward as FeedForward
from fast_attention.layers.image import ImageLinearAttention as ImageLinearAttention
from fast_attention.layers.inputs import Inputs as Inputs
from fast_attention.layers.linear import Linear as Linear
from fast_attention.layers.masked_batch_norm import MaskedBatchNorm as MaskedBatchNorm
from fast_attention.layers.norms import NORMS as NORMS
from fast_attention.layers.norms import ReZero as ReZero
from fast_attention.layers.norms import ScaleNorm as ScaleNorm
from fast_attention.layers.norms import make_norm as make_norm
from fast_attention.layers.positions import AxialPositions as AxialPositions
from fast_attention.layers.positions import LearnedPositions as LearnedPositions
from fast_attention.layers.positions import sinusoids as sinusoids
from fast_attention.layers.product_key_memory import ProductKeyMemory as ProductKeyMemory
from fast_attention.layers.product_key_memory import is_memory_value as is_memory_value
from fast_attention.layers.stack.layer_dropout import draw_layer_mask as draw_layer_mask
from fast_attention.layers.stack.reversible import residual as residual
from fast_attention.layers.stack.reversible import (
    reversible_residual as reversible_residual,
)
from fast_attention.layers.stack.stack import Stack as Stack
from fast_attention.layers.stack.stack import StackConfig as StackConfig
from fast_attention.layers.stack.sublayer import FeedForwardConfig as FeedForwardConfig
from fast_attention.layers.stack.sublayer import MemoryConfig as MemoryConfig
from fast_attention.layers.stack.sublayer import NormConfig as NormConfig
from fast_attention.layers.stack.sublayer import Sublayer as Sublayer
from fast_attention.layers.stack.sublayer import SublayerConfig as SublayerConfig
from fast_attention.layers.token_shift import shift_tokens as shift_tokens
from fast_attention.mechanisms.rotary import rotate as rotate
