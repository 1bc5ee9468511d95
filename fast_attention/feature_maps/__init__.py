"""Feature maps from queries and keys to features. Does not depend on attention or Flax."""

from fast_attention.feature_maps.base import FeatureMap as FeatureMap
from fast_attention.feature_maps.base import Features as Features
from fast_attention.feature_maps.darkformer import DarkformerFeatures as DarkformerFeatures
from fast_attention.feature_maps.darkformer import DarkformerParameters as DarkformerParameters
from fast_attention.feature_maps.elementwise import KERNELS as KERNELS
from fast_attention.feature_maps.elementwise import ElementwiseFeatures as ElementwiseFeatures
from fast_attention.feature_maps.elementwise import ExponentialFeatures as ExponentialFeatures
from fast_attention.feature_maps.elementwise import IdentityFeatures as IdentityFeatures
from fast_attention.feature_maps.elementwise import LogFeatures as LogFeatures
from fast_attention.feature_maps.elementwise import (
    SignedElementwiseFeatures as SignedElementwiseFeatures,
)
from fast_attention.feature_maps.elementwise import elementwise_map as elementwise_map
from fast_attention.feature_maps.gaussian_family import TUNED_ESTIMATORS as TUNED_ESTIMATORS
from fast_attention.feature_maps.gaussian_family import Tuning as Tuning
from fast_attention.feature_maps.gaussian_family import tune as tune
from fast_attention.feature_maps.gaussian_family import untuned as untuned
from fast_attention.feature_maps.hedgehog import HedgehogFeatures as HedgehogFeatures
from fast_attention.feature_maps.hedgehog import HedgehogParameters as HedgehogParameters
from fast_attention.feature_maps.learned import LearnedFeatures as LearnedFeatures
from fast_attention.feature_maps.moments import Moments as Moments
from fast_attention.feature_maps.projections import PROJECTIONS as PROJECTIONS
from fast_attention.feature_maps.projections import draw_projection as draw_projection
from fast_attention.feature_maps.projections import haar_orthogonal as haar_orthogonal
from fast_attention.feature_maps.projections import iid_projection as iid_projection
from fast_attention.feature_maps.projections import orthogonal_projection as orthogonal_projection
from fast_attention.feature_maps.softmax import HyperbolicFeatures as HyperbolicFeatures
from fast_attention.feature_maps.softmax import PositiveFeatures as PositiveFeatures
from fast_attention.feature_maps.softmax import TrigonometricFeatures as TrigonometricFeatures
from fast_attention.feature_maps.trained import TRAINABLE_ESTIMATORS as TRAINABLE_ESTIMATORS
from fast_attention.feature_maps.trained import TrainedParameters as TrainedParameters
from fast_attention.feature_maps.trained import begin_training as begin_training
from fast_attention.feature_maps.trained import fold_trained as fold_trained
from fast_attention.feature_maps.tuned import TunedFeatures as TunedFeatures
from fast_attention.feature_maps.tuned import TunedParameters as TunedParameters
from fast_attention.feature_maps.tuned import fold as fold
