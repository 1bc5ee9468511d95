"""Models built from the layers, and text generation with them."""

from fast_attention.models.config import TransformerConfig as TransformerConfig
from fast_attention.models.generate import generate as generate
from fast_attention.models.transformer import DecodeState as DecodeState
from fast_attention.models.transformer import Transformer as Transformer
