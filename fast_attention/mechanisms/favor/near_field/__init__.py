"""Softmax attention, exact near every position and estimated by features beyond."""

from fast_attention.mechanisms.favor.near_field.api import (
    near_field_attention as near_field_attention,
)
from fast_attention.mechanisms.favor.near_field.state import (
    NearFieldState as NearFieldState,
)
from fast_attention.mechanisms.favor.near_field.state import empty_state as empty_state
from fast_attention.mechanisms.favor.near_field.state import prefill as prefill
from fast_attention.mechanisms.favor.near_field.state import step as step
