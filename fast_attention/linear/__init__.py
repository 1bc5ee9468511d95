"""Linear attention: one mergeable state, read causally or both ways. Knows nothing of Flax."""

from fast_attention.linear.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from fast_attention.linear.api import linear_attention as linear_attention
from fast_attention.linear.decode import prefill as prefill
from fast_attention.linear.decode import step as step
from fast_attention.linear.sharded.api import (
    sharded_linear_attention as sharded_linear_attention,
)
from fast_attention.linear.sharded.shard import (
    linear_attention_of_shard as linear_attention_of_shard,
)
from fast_attention.linear.state import LinearAttentionState as LinearAttentionState
from fast_attention.linear.state import empty_state as empty_state
from fast_attention.linear.state import merge as merge
