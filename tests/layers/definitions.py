"""The layers once more in numpy, float64, one position or head at a time where that is plainest.

Each takes its parameters from a module and its options from the caller, so that the two share
nothing but numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ACTIVATIONS = {
    "celu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "identity": lambda x: x,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "swish": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compiled(function):
    """Jits with little optimisation: in these tests compiling costs far more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def filled(make, seed=0):
    """The module that `make` makes, but with random values, drawn in numpy, for all that it holds.

    Zero biases and unit scales would hide mistakes, and initializers take seconds to compile.
    """
    random = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def fill(x):
        return jnp.asarray(random.normal(scale=0.5, size=x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def linear(module, x):
    out = x @ array(module.kernel)
    return out if module.bias is None else out + array(module.bias)


def layer_norm(module, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * array(module.scale) + array(module.bias)


def sinusoids(positions, features, base=10000.0):
    angles = [t * base ** (-(i - i % 2) / features) for t in positions for i in range(features)]
    waves = [np.cos(a) if i % features % 2 else np.sin(a) for i, a in enumerate(angles)]
    return np.reshape(waves, (len(positions), features))


def rotate(x, positions, base=10000.0):
    """`x` is `[T, H, D]`: features i and i + D/2 are one complex number."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.asarray(positions)[:, None] * base ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def shift(x, shifts=(0, 1)):
    """`x` is `[T, M]`: group i of channels comes from the position `shifts[i]` before."""
    out, width = x.copy(), x.shape[-1] // len(shifts)
    for t, c in np.ndindex(len(x), width * len(shifts)):
        source = t - shifts[c // width]
        out[t, c] = x[source, c] if 0 <= source < len(x) else 0
    return out


def exponential(query, key):
    """The kernel of exact attention."""
    return np.exp(query @ key / np.sqrt(len(query)))


def attention(
    module,
    x,
    num_heads,
    *,
    causal=False,
    rotary=False,
    positions=None,
    visible=None,
    kernel=exponential,
):
    """`x` is one row `[T, M]`; position t sees s where `visible[t, s]`, or else gives zeros."""
    length = len(x)
    query = linear(module.project.query, x).reshape(length, num_heads, -1)
    key, value = (
        linear(m, x).reshape(length, -1, query.shape[-1])
        for m in (module.project.key, module.project.value)
    )
    if rotary:
        positions = np.arange(length) if positions is None else positions
        query, key = rotate(query, positions), rotate(key, positions)
    visible = np.ones((length, length), bool) if visible is None else visible
    if causal:
        visible = np.tri(length, dtype=bool) & visible
    group = num_heads // key.shape[1]
    out = np.zeros_like(query)
    for t, h in np.ndindex(length, num_heads):
        seen = np.flatnonzero(visible[t])
        weights = np.array([kernel(query[t, h], key[s, h // group]) for s in seen])
        if len(seen):
            out[t, h] = weights / weights.sum() @ value[seen, h // group]
    return linear(module.out, out.reshape(length, -1))


def feed_forward(module, x, activation="gelu"):
    return linear(module.down, ACTIVATIONS[activation](linear(module.up, x)))


def block(sublayers, x, num_heads, *, shift_tokens=False, activation="gelu", **options):
    """`x` is one row `[T, M]`; `options` are those of `attention`."""
    before = shift if shift_tokens else lambda x: x
    first, second = sublayers
    x = x + attention(first.inner, before(layer_norm(first.norm, x)), num_heads, **options)
    return x + feed_forward(second.inner, before(layer_norm(second.norm, x)), activation)


def transformer(model, tokens):
    """Logits `[T, V]` of one row of tokens."""
    config = model.config
    x = array(model.embed.embedding)[tokens]
    if config.positions == "learned":
        x = x + array(model.positions.table)[: len(x)]
    if config.positions == "sinusoidal":
        x = x + sinusoids(range(len(x)), config.emb_dim)
    for layer in model.stack.blocks:
        x = block(
            layer,
            x,
            config.num_heads,
            causal=config.causal,
            rotary=config.positions == "rotary",
            shift_tokens=config.shift_tokens,
            activation=config.activation,
        )
    x = layer_norm(model.norm, x)
    if config.tie_embeddings:
        return x @ array(model.embed.embedding).T / np.sqrt(config.emb_dim)
    return linear(model.head, x)
