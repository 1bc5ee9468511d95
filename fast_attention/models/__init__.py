"""Models built from the layers, and text generation with them."""

from fast_attention.models.config import LanguageModelConfig as LanguageModelConfig
from fast_attention.models.config import TransformerConfig as TransformerConfig
from fast_attention.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from fast_attention.models.generation import Sampling as Sampling
from fast_attention.models.generation import generate as generate
from fast_attention.models.language_model import DecodeState as DecodeState
from fast_attention.models.language_model import LanguageModel as LanguageModel
from fast_attention.models.losses import cross_entropy as cross_entropy
from fast_attention.models.losses import next_token_loss as next_token_loss
from fast_attention.models.originals.linear_attention_transformer import (
    LinearAttentionTransformer as LinearAttentionTransformer,
)
from fast_attention.models.originals.linear_attention_transformer import (
    LinearAttentionTransformerLM as LinearAttentionTransformerLM,
)
from fast_attention.models.originals.linear_attention_transformer import (
    LinformerContextSettings as LinformerContextSettings,
)
from fast_attention.models.originals.linear_attention_transformer import (
    LinformerSettings as LinformerSettings,
)
from fast_attention.models.originals.performer import Performer as Performer
from fast_attention.models.originals.performer import (
    PerformerEncoderDecoder as PerformerEncoderDecoder,
)
from fast_attention.models.originals.performer import PerformerLM as PerformerLM
from fast_attention.models.originals.pretrained import Pretrained as Pretrained
from fast_attention.models.originals.pretrained import load_pretrained as load_pretrained
from fast_attention.models.originals.reformer import LSHSelfAttention as LSHSelfAttention
from fast_attention.models.originals.reformer import Reformer as Reformer
from fast_attention.models.originals.reformer import (
    ReformerEncoderDecoder as ReformerEncoderDecoder,
)
from fast_attention.models.originals.reformer import ReformerLM as ReformerLM
from fast_attention.models.originals.torch_weights import (
    load_torch_state_dict as load_torch_state_dict,
)
from fast_attention.models.record_plot import plot_recordings as plot_recordings
from fast_attention.models.recording import Recording as Recording
from fast_attention.models.recording import record as record
from fast_attention.models.training import make_train_step as make_train_step
from fast_attention.models.transformer import Transformer as Transformer
