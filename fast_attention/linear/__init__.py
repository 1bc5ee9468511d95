"""Linear attention: one mergeable state, causal or bidirectional. Does not depend on Flax."""

from fast_attention.linear.api import linear_attention as linear_attention
from fast_attention.linear.decode import prefill as prefill
from fast_attention.linear.decode import step as step
from fast_attention.linear.implementations import IMPLEMENTATIONS as IMPLEMENTATIONS
from fast_attention.linear.state import LinearAttentionState as LinearAttentionState
from fast_attention.linear.state import empty_state as empty_state
from fast_attention.linear.state import merge as merge
from fast_attention.linear.types import Plan as Plan
