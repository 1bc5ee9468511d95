"""Errors of an attention function on given queries and keys, with curves and plots."""

from fast_attention.diagnostics.curves import ErrorCurves as ErrorCurves
from fast_attention.diagnostics.curves import error_curves as error_curves
from fast_attention.diagnostics.errors import ApproximationError as ApproximationError
from fast_attention.diagnostics.errors import Recommendation as Recommendation
from fast_attention.diagnostics.errors import approximation_error as approximation_error
from fast_attention.diagnostics.errors import attention_matrix as attention_matrix
from fast_attention.diagnostics.errors import recommend_features as recommend_features
from fast_attention.diagnostics.errors import relative_error as relative_error
