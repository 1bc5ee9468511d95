"""Memory and communication of training on many devices: ``python -m benchmarks.scaling``.

``check`` compiles training steps of protein models for 4 and 8 simulated devices, on several
meshes, and prints what the compiler plans beside the formulas of `benchmarks.scaling_formulas`:
nothing is run. ``plan`` prints the formulas for models and meshes that are not here.

Compiled programs are looked through for collectives, whose results are counted in bytes. Layers are
not a loop in them, and no collective lies in one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks import scaling_formulas as formulas
from benchmarks.scaling_formulas import Layout, Shape
from benchmarks.tables import table

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
CHECKED = (
    Layout(),
    Layout(data=4),
    Layout(data=8),
    Layout(fsdp=4),
    Layout(fsdp=8),
    Layout(sequence=4),
    Layout(sequence=8),
    Layout(model=4),
    Layout(model=8),
    Layout(fsdp=4, sequence=2),
    Layout(data=2, fsdp=2, sequence=2),
    Layout(fsdp=2, sequence=2, model=2),
)
LETTERS = 30

MODELS = {
    "36 layers, d = 512": {
        "layers": 36, "width": 512, "heads": 8, "mlp": 2048, "features": 256
    },
    "7B": {"layers": 32, "width": 4096, "heads": 32, "mlp": 16384, "features": 256},
}  # fmt: skip
LENGTHS = (8192, 65536, 2**20)
DEVICES = (8, 64, 512, 4096)
MEMORY = 64 * 2**30
"""Bytes that a plan may use of a device of 80 GB."""
TOKENS, MOST_TOKENS = 2**14, 2**17
"""Tokens of a step for each device, as asked for, and the most where rows are long."""
SPEED = 160e12
"""Operations a second: 40 % of 400 TFLOP/s."""

_SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s8": 1, "u8": 1, "s64": 8}


class Compiled:
    """What the compiler plans for one training step, in bytes on each device.

    Attributes:
      state: arguments that are not the batch.
      temporaries: all that is neither an argument nor a result.
      collectives: by kind, without those of less than 256 bytes.
    """

    def __init__(self, shape: Shape, layout: Layout):
        """Compiles, without running anything."""
        program, batch = lower(shape, layout)
        program = program.compile()
        memory = program.memory_analysis()
        self.state = memory.argument_size_in_bytes - batch
        self.temporaries = memory.temp_size_in_bytes
        self.collectives = collectives(program.as_text())


def lower(shape: Shape, layout: Layout) -> tuple[Any, int]:
    """Lowers a training step of a protein model; also returns the bytes of a device's batch."""
    import jax
    import jax.numpy as jnp

    from fast_attention import make_fast_softmax_attention
    from fast_attention.mesh.meshes import batch_shardings, make_mesh
    from fast_attention.protein_lm.data.domains import make_protein_domain
    from fast_attention.protein_lm.models import FlaxLM

    mesh = make_mesh(**dataclasses.asdict(layout), devices=jax.devices()[: layout.devices])
    model = FlaxLM(
        make_protein_domain(length=shape.length),
        attention_fn=make_fast_softmax_attention(nb_features=shape.features),
        mesh=mesh,
        num_layers=shape.layers,
        emb_dim=shape.width,
        qkv_dim=shape.width,
        num_heads=shape.heads,
        mlp_dim=shape.mlp,
        positions="rotary",
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        remat=True,
    )
    names = ("inputs", "targets", "weights", "segment_ids", "positions")
    types = {name: jnp.float32 if name == "weights" else jnp.int32 for name in names}
    size = (shape.rows, shape.length)
    batch: Any = {name: jax.ShapeDtypeStruct(size, kind) for name, kind in types.items()}
    batch = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        batch,
        batch_shardings(mesh, batch),
    )
    own = [int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in batch.values()]
    return model.train_step.lower(model.abstract_state, batch), sum(own)


def collectives(text: str, *, smallest: int = 256) -> dict[str, int]:
    """Bytes that collectives give a device, by kind, from the text of a compiled program."""
    found: collections.Counter[str] = collections.Counter()
    for shapes, kind in re.findall(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", text):
        size = sum(
            int(np.prod([int(n) for n in numbers.split(",") if n], initial=1)) * _SIZES[kind_of]
            for kind_of, numbers in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        )
        if size >= smallest:
            found[kind] += size
    return dict(found)


def predicted(shape: Shape, layout: Layout) -> dict[str, float]:
    """What the formulas say, by the names of `compared`."""
    return {
        "state": formulas.state_bytes(shape, layout),
        "temporaries": formulas.working_bytes(shape, layout),
        "all-gather": formulas.parameter_gathering(shape, layout),
        "all-reduce": formulas.gradient_reduction(shape, layout)
        + formulas.activation_reduction(shape, layout),
        "collective-permute": formulas.state_exchange(shape, layout),
    }


def compared(shape: Shape, layout: Layout) -> dict[str, tuple[float, float]]:
    """What the formulas say and what the compiler plans, by quantity; MiB on a device."""
    found = Compiled(shape, layout)
    planned = {"state": found.state, "temporaries": found.temporaries} | found.collectives
    expected = predicted(shape, layout)
    names = [name for name in (*expected, *KINDS) if expected.get(name) or planned.get(name)]
    return {
        name: (expected.get(name, 0.0) / 2**20, planned.get(name, 0) / 2**20)
        for name in dict.fromkeys(names)
    }


def check(layouts: Iterable[Layout], shape: Shape) -> str:
    """Compares formulas with compiled programs, as a table."""
    rows = []
    for layout in layouts:
        cells = compared(shape, layout)
        columns = ("state", "temporaries", *KINDS)
        rows.append([str(layout), *(_pair(cells.get(name)) for name in columns)])
        print(f"{layout}: {cells}", flush=True)
    return table(["mesh", "state", "temporaries", *KINDS], rows)


def plan(name: str) -> str:
    """A table of one model on many devices: at each length the mesh that asks least of the network.

    Streams are bfloat16, attention states, parameters and gradients float32.
    """
    rows = []
    for devices in DEVICES:
        for length in LENGTHS:
            plans = [_planned(name, length, layout) for layout in _layouts(name, devices, length)]
            fitting = [one for one in plans if one.memory <= MEMORY]
            head = [f"{devices:,}", f"{length:,}"]
            if fitting:
                rows.append(head + min(fitting, key=lambda one: one.rate).cells())
            else:
                least = min(plans, key=lambda one: one.memory)
                rows.append([*head, f"none fits: {least.layout} least", *least.cells()[1:]])
    head = ["devices", "L", "mesh", "rows", "parameters GiB", "working GiB", "gathered GiB"]
    last = ["reduced GiB", "attention states MiB", "compute s", "GB/s to hide"]
    return table([*head, *last], rows)


@dataclasses.dataclass(frozen=True)
class _Plan:
    shape: Shape
    layout: Layout

    @property
    def state(self) -> float:
        return formulas.state_bytes(self.shape, self.layout)

    @property
    def working(self) -> float:
        return formulas.working_bytes(self.shape, self.layout)

    @property
    def memory(self) -> float:
        return self.state + self.working

    @property
    def reduced(self) -> float:
        gradients = formulas.gradient_reduction(self.shape, self.layout) / self.layout.fsdp
        return gradients + formulas.activation_reduction(self.shape, self.layout)

    @property
    def seconds(self) -> float:
        return self.shape.flops / self.layout.devices / SPEED

    @property
    def rate(self) -> float:
        """Bytes a second that must cross to take no longer than computing."""
        gathered = formulas.parameter_gathering(self.shape, self.layout)
        states = formulas.state_exchange(self.shape, self.layout)
        return (gathered + self.reduced + states) / self.seconds

    def cells(self) -> list[str]:
        """Columns of the table."""
        gathered = formulas.parameter_gathering(self.shape, self.layout)
        sizes = (self.state, self.working, gathered, self.reduced)
        states = formulas.state_exchange(self.shape, self.layout)
        return [
            str(self.layout),
            f"{self.shape.rows:,}",
            *(f"{size / 2**30:.2f}" for size in sizes),
            f"{states / 2**20:,.1f}",
            f"{self.seconds:.2f}",
            f"{self.rate / 1e9:.1f}",
        ]


def _layouts(name: str, devices: int, length: int) -> Iterable[Layout]:
    most_rows = max(1, MOST_TOKENS * devices // length)
    powers = [2**i for i in range(devices.bit_length())]
    for fsdp, sequence, model in itertools.product(powers, powers, (1, 2, 4, 8)):
        rest = devices // (fsdp * sequence * model)
        if rest and rest * fsdp <= most_rows and MODELS[name]["heads"] % model == 0:
            yield Layout(rest, fsdp, sequence, model)


def _planned(name: str, length: int, layout: Layout) -> _Plan:
    groups = layout.data * layout.fsdp
    rows = max(groups, TOKENS * layout.devices // length)
    sizes = MODELS[name] | {"rows": rows, "length": length}
    return _Plan(Shape(**sizes, letters=LETTERS, itemsize=2), layout)


def _pair(cell: tuple[float, float] | None) -> str:
    return "" if cell is None else f"{cell[0]:,.1f} / {cell[1]:,.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "plan"))
    parser.add_argument("--layers", type=int, default=4, help="of the model that is checked")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--meshes", type=int, nargs="*", help="numbers of those to check, from 0")
    options = parser.parse_args(arguments)
    if options.what == "plan":
        for name, sizes in MODELS.items():
            shape = Shape(**sizes, letters=LETTERS, rows=1, length=1)
            print(f"\n{name}: {shape.parameters:,} parameters\n\n{plan(name)}")
        return
    flag = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    d = options.width
    shape = Shape(options.layers, d, d // 64, 4 * d, 256, LETTERS - 1, options.rows, options.length)
    layouts = CHECKED if options.meshes is None else [CHECKED[i] for i in options.meshes]
    print(check(layouts, shape))


if __name__ == "__main__":
    main()
