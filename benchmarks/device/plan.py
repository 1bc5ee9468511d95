"""What is checked and measured on a device, the most valuable first."""

from __future__ import annotations

import dataclasses
import functools

from benchmarks.device import measures
from benchmarks.device.run import Task
from benchmarks.settings import Setting

DTYPES = ("bfloat16", "float32")

KERNELS = {
    "gpu": ("pallas_gpu", "parallel_chunks"),
    "tpu": ("pallas_tpu",),
    "cpu": ("parallel_chunks",),
}
"""Implementations of a platform besides ``chunked``."""

EXACT = {"gpu": ("cudnn", "xla"), "tpu": ("xla",), "cpu": ("xla",)}
"""Implementations of exact attention."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
      check: the shape of correctness.
      widths: D of the checks.
      speed: the shape of the first comparison.
      lengths: T of the others, with as many tokens in all.
      chunks: chunk sizes tried.
      shapes: D and M of the rows of the chunk table.
      training: rows, length, layers and width of the model that is trained.
      repeats: samples of a time.
    """

    check: Setting
    widths: tuple[int, ...]
    speed: Setting
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    training: tuple[int, int, int, int]
    repeats: int


SIZES = {
    "accelerator": Sizes(
        check=Setting(length=1000, batch=2, heads=8, head_dim=64, features=256),
        widths=(64, 128),
        speed=Setting(length=4096, batch=8, heads=8, head_dim=64, features=256),
        lengths=(1024, 2048, 8192, 16384, 32768, 65536),
        chunks=(64, 128, 256, 512, 1024),
        shapes=((64, 256), (64, 128), (128, 256)),
        training=(8, 4096, 6, 512),
        repeats=7,
    ),
    "cpu": Sizes(
        check=Setting(length=70, batch=1, heads=2, head_dim=16, features=32),
        widths=(16,),
        speed=Setting(length=128, batch=2, heads=2, head_dim=16, features=32),
        lengths=(),
        chunks=(64,),
        shapes=((16, 32),),
        training=(2, 64, 1, 32),
        repeats=3,
    ),
}


def tasks_of(platform: str, sizes: Sizes) -> dict[str, Task]:
    """Returns the tasks by name."""
    tasks: dict[str, Task] = {}
    both = (("causal", True), ("bidirectional", False))
    names = (*KERNELS[platform], "chunked")
    for implementation in names:
        for width in sizes.widths:
            for dtype in DTYPES:
                for kind, causal in both:
                    setting = dataclasses.replace(sizes.check, head_dim=width, dtype=dtype)
                    tasks[f"check-{implementation}-{kind}-{dtype}-{width}"] = functools.partial(
                        measures.check, setting, implementation, causal
                    )
    base = dataclasses.replace(sizes.speed, dtype=DTYPES[0])
    programs = tuple((name, None) for name in names)
    exact = EXACT[platform]
    compare = functools.partial(measures.compare, programs, exact, repeats=sizes.repeats)
    for kind, causal in both:
        tasks[f"speed-{kind}-{base.length}"] = functools.partial(compare, base, causal)
    for head_dim, features in sizes.shapes:
        for kind, causal in both:
            setting = dataclasses.replace(base, head_dim=head_dim, features=features)
            for name in names:
                if name.startswith("pallas"):
                    continue
                chunks = tuple((name, chunk) for chunk in sizes.chunks if chunk <= base.length)
                tasks[f"chunks-{name}-{kind}-{head_dim}-{features}"] = functools.partial(
                    measures.compare, chunks, (), setting, causal, repeats=sizes.repeats
                )
    tokens = base.batch * base.length
    for length in sizes.lengths:
        setting = dataclasses.replace(base, length=length, batch=max(1, tokens // length))
        for kind, causal in both:
            tasks[f"speed-{kind}-{length}"] = functools.partial(compare, setting, causal)
    tasks["training"] = functools.partial(measures.train, *sizes.training)
    return tasks
