"""Linear attention: one mergeable state, read causally or both ways. Knows nothing of Flax."""

from fast_attention.linear_attention.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from fast_attention.linear_attention.api import linear_attention as linear_attention
from fast_attention.linear_attention.decode import prefill as prefill
from fast_attention.linear_attention.decode import step as step
from fast_attention.linear_attention.shard import (
    linear_attention_of_shard as linear_attention_of_shard,
)
from fast_attention.linear_attention.sharded import (
    sharded_linear_attention as sharded_linear_attention,
)
from fast_attention.linear_attention.state import LinearAttentionState as LinearAttentionState
from fast_attention.linear_attention.state import empty_state as empty_state
from fast_attention.linear_attention.state import merge as merge
