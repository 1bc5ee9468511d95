"""trial"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fast_attention.models import PerformerEncoderDecoder
from fast_attention.models.training import make_train_step

p = argparse.ArgumentParser()
p.add_argument("--length", type=int, default=128)
p.add_argument("--symbols", type=int, default=16)
p.add_argument("--dim", type=int, default=64)
p.add_argument("--heads", type=int, default=2)
p.add_argument("--dim_head", type=int, default=32)
p.add_argument("--features", type=int, default=128)
p.add_argument("--dec_depth", type=int, default=1)
p.add_argument("--enc_depth", type=int, default=1)
p.add_argument("--batch", type=int, default=32)
p.add_argument("--steps", type=int, default=600)
p.add_argument("--lr", type=float, default=3e-3)
p.add_argument("--general", type=str, default="")
p.add_argument("--rotary", type=int, default=1)
p.add_argument("--shift", type=int, default=1)
p.add_argument("--embscale", type=float, default=1.0)
p.add_argument("--plan", type=str, default="16:300,128:300")
p.add_argument("--seed", type=int, default=0)
a = p.parse_args()
both = dict(
    num_tokens=a.symbols + 2,
    heads=a.heads,
    dim_head=a.dim_head,
    max_seq_len=a.length,
    nb_features=a.features,
    shift_tokens=bool(a.shift),
    rotary_position_emb=bool(a.rotary),
)
if a.general:
    both |= dict(generalized_attention=True, kernel_fn=a.general)
kw = {f"enc_{k}": v for k, v in both.items()} | {f"dec_{k}": v for k, v in both.items()}
model = PerformerEncoderDecoder(
    dim=a.dim, enc_depth=a.enc_depth, dec_depth=a.dec_depth, **kw, rngs=nnx.Rngs(a.seed)
)
for m in (model.encoder, model.decoder):
    m.embed.embedding[...] = m.embed.embedding[...] * a.embscale
steps = sum(int(x.split(":")[1]) for x in a.plan.split(","))
schedule = optax.warmup_cosine_decay_schedule(0, a.lr, steps // 10, steps, a.lr / 20)
opt = nnx.Optimizer(
    model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), wrt=nnx.Param
)
step = make_train_step(lambda m, b, r: m.loss(b[:, 1:], b))
rng = np.random.default_rng(a.seed)


def batch(n, length=a.length):
    s = rng.integers(2, a.symbols + 2, (n, length))
    return jnp.asarray(np.concatenate([np.ones((n, 1), int), s], 1), jnp.int32)


t0, c0 = time.time(), time.process_time()
i = 0
for part in a.plan.split(","):
    length, n = map(int, part.split(":"))
    for _ in range(n):
        i += 1
        loss = step(model, opt, batch(a.batch * a.length // length, length), None)
        if i % 50 == 0 or i == 1:
            print(
                length,
                i,
                f"{float(loss):.4f}",
                f"{time.time() - t0:.0f}s cpu {time.process_time() - c0:.0f}s",
                flush=True,
            )
from fast_attention.models import record

t = batch(4)
for r in record(model, t[:, 1:], t[:, :-1]):
    w = r.weights
    if "decoder" in r.path:
        d = jnp.diagonal(w, axis1=2, axis2=3).mean((0, 2))
        print(
            r.path,
            "diag",
            np.round(np.asarray(d), 3),
            "first16",
            np.round(np.asarray(jnp.diagonal(w, axis1=2, axis2=3)[..., :16].mean((0, 2))), 3),
            "max",
            np.round(np.asarray(w.max(-1).mean((0, 2))), 3),
        )
t = batch(64)
out = model.generate(
    t[:, 1:], t[:, :1], key=jax.random.key(0), max_new_tokens=a.length, temperature=0.0
)
print(
    "acc",
    float(jnp.mean(out == t[:, 1:])),
    f"{time.time() - t0:.0f}s cpu {time.process_time() - c0:.0f}s",
)
