"""Attention among positions that hash alike (Reformer). Knows nothing of Flax."""

from fast_attention.mechanisms.lsh.hashed.api import lsh_attention as lsh_attention
from fast_attention.mechanisms.lsh.hashed.api import n_buckets as n_buckets
from fast_attention.mechanisms.lsh.hashed.hashing import draw_rotations as draw_rotations
from fast_attention.mechanisms.lsh.hashed.hashing import hash_vectors as hash_vectors
from fast_attention.mechanisms.lsh.hashed.options import Hashing as Hashing
