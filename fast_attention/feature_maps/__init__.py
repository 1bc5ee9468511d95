"""Feature maps: how queries and keys become features. Knows nothing of attention or Flax."""

from fast_attention.feature_maps.base import FeatureMap as FeatureMap
from fast_attention.feature_maps.base import Features as Features
from fast_attention.feature_maps.elementwise import KERNELS as KERNELS
from fast_attention.feature_maps.elementwise import ElementwiseFeatures as ElementwiseFeatures
from fast_attention.feature_maps.elementwise import ExponentialFeatures as ExponentialFeatures
from fast_attention.feature_maps.elementwise import IdentityFeatures as IdentityFeatures
from fast_attention.feature_maps.elementwise import LogFeatures as LogFeatures
from fast_attention.feature_maps.elementwise import (
    SignedElementwiseFeatures as SignedElementwiseFeatures,
)
from fast_attention.feature_maps.elementwise import elementwise_map as elementwise_map
from fast_attention.feature_maps.projections import PROJECTIONS as PROJECTIONS
from fast_attention.feature_maps.projections import draw_projection as draw_projection
from fast_attention.feature_maps.projections import haar_orthogonal as haar_orthogonal
from fast_attention.feature_maps.projections import iid_projection as iid_projection
from fast_attention.feature_maps.projections import orthogonal_projection as orthogonal_projection
from fast_attention.feature_maps.softmax import HyperbolicFeatures as HyperbolicFeatures
from fast_attention.feature_maps.softmax import PositiveFeatures as PositiveFeatures
from fast_attention.feature_maps.softmax import TrigonometricFeatures as TrigonometricFeatures
