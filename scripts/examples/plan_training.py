r"""Will a fine-tuning fit, and what will it cost? Compiles finetune.py's own step for devices that need not be there.

\b
Examples:
    plan_training.py --topology cpu:8 --mesh fsdp=8
    scripts/tpu --topology v5p:2x2x2 --mesh fsdp=8
    scripts/tpu --topology v5e:4x4 --mesh fsdp=16 \
        --param-dtype mxfp4 --lora '.*(q|k|v|o)_proj'

scripts/tpu makes the environment that compiles for TPUs on any machine, and runs this in it. Topologies are those of libtpu:
v5p:2x2x2 is 8 chips. No weights are needed. Equal layers are one loop (oss_model.scanned), as in finetune.py, so compiling
takes a few minutes whatever the depth; where rules train some layers only, each is compiled.

\b
Exit status:
    0 it fits, 1 it does not, 2 bad input, 70 a bug
"""

import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")  # asked for where there is no TPU
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans at a time: neither uses a TPU

import click
import jax
import numpy as np
from collectives import Collective, collectives
from finetune import Matching, pattern
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oss_model import InputError, ModelConfig, add_lora
from oss_model.exits import run_click
from oss_model.expert_parallel import capacity
from oss_model.memory import size
from oss_model.params import abstract_model
from oss_model.scanned import repeats, scanned
from oss_model.sharding import activation_spec, check, mesh_axes, partition_specs
from oss_model.training import Batch, optimizer, train_step
from oss_model.training.costs import CHIPS, Chip, flops

TPUS = ("v5p", "v5e", "v6e")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for."""

    cfg: ModelConfig
    topology: str
    mesh: tuple[tuple[str, int], ...]
    batch: int
    length: int
    lora: tuple[str, ...] = ()
    rank: int = 16
    chosen: str = ".*"


@dataclasses.dataclass
class Cost:
    """Of one step on one device, in bytes.

    Attributes:
      used: all together, as far as it is known: arguments, temporaries, outputs, less what is donated.
      laid_out: whether that is what the compiler has laid out, and not `memory_analysis`, which may count more.
      flops: by `flops`, shared out evenly.
    """

    used: int
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    laid_out: bool = True
    donated: int = 0
    flops: float = 0.0
    sent: list[Collective] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def devices_of(topology: str) -> list[Any]:
    """Of `cpu:8`, or of a TPU topology such as v5p:2x2x2."""
    kind, _, shape = topology.partition(":")
    if kind == "cpu":
        if not shape.isdigit() or int(shape) > len(jax.devices("cpu")):
            raise InputError(f"--topology: expected cpu:N of at most {len(jax.devices('cpu'))} devices, found {topology!r}")
        return jax.devices("cpu")[: int(shape)]
    if kind not in TPUS:
        raise InputError(f"--topology: expected cpu:N or one of {', '.join(TPUS)} such as v5p:2x2x2, found {topology!r}")
    from jax.experimental import topologies

    one = {"chips_per_host_bounds": (1, 1, 1)} if shape in ("1x1", "1x1x1") else {}  # libtpu takes a host to have four
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices)
    except Exception as error:  # libtpu's are bare
        said = str(error).splitlines()[0]
        raise InputError(
            f"--topology {topology}: expected one that libtpu knows, in scripts/tpu's environment ({said})"
        ) from None


def mesh_of(devices: list[Any], axes: tuple[tuple[str, int], ...]) -> Mesh:
    sizes = [count for _, count in axes]
    if math.prod(sizes) != len(devices):
        found = ",".join(f"{name}={count}" for name, count in axes)
        raise InputError(f"--mesh: expected sizes that multiply to {len(devices)} devices, found {found}")
    mesh = Mesh(np.array(devices).reshape(sizes), [name for name, _ in axes], axis_types=(AxisType.Auto,) * len(axes))
    check(mesh)
    return mesh


def rows_of(axes: tuple[tuple[str, int], ...]) -> int:
    """One a device, or where `context` cuts the length one for those that share it."""
    return math.prod(count for name, count in axes if name != "context")


def cost(plan: Plan) -> Cost:
    """Compile the step, without values.

    Returns:
      With `used` alone where the compiler finds that it does not fit.
    """
    mesh = mesh_of(devices_of(plan.topology), plan.mesh)
    model = nnx.merge(*abstract_model(plan.cfg, mesh))
    if plan.lora:
        add_lora(model, plan.lora, plan.rank, rngs=nnx.Rngs(0))
    trained = nnx.LoRAParam if plan.lora else Matching(plan.chosen)
    graphdef, params, frozen = nnx.split(scanned(model) if repeats(model, trained) else model, trained, ...)
    descent, everywhere = optimizer(1e-4), NamedSharding(mesh, PartitionSpec())
    like = lambda node: isinstance(node, nnx.State)  # noqa: E731
    moments = jax.tree.map(
        lambda node: jax.tree.map(_placed_as, node, params) if like(node) else _placed(node, everywhere),
        jax.eval_shape(descent.init, params),
        is_leaf=like,
    )
    rows = (plan.batch, plan.length + 1)
    spec = activation_spec("bl", rows, {name: count for name, count in plan.mesh if count > 1})
    tokens = jax.ShapeDtypeStruct(rows, np.int32, sharding=NamedSharding(mesh, spec))
    placed = jax.tree.map(lambda a: a.sharding, (params, moments))
    start, cpu = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        step = jax.jit(train_step(graphdef, descent), donate_argnums=(0, 1), out_shardings=(*placed, None))
        lowered = step.lower(params, moments, frozen, Batch(tokens))  # type: ignore[arg-type]
        try:
            compiled, used = _compiled(lowered)
        except jax.errors.JaxRuntimeError as error:
            return Cost(_used(error, _nbytes((params, moments, frozen))))
    memory, total = compiled.memory_analysis(), sum(flops(plan.cfg, plan.batch, plan.length, lora=bool(plan.lora)).values())
    assert memory is not None
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(
        used or fixed + memory.temp_size_in_bytes,
        laid_out=used > 0,
        arguments=memory.argument_size_in_bytes,
        temporaries=used - fixed if used else memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        flops=total / mesh.size,
        sent=collectives(compiled.as_text() or ""),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
    )


def _compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, int]:
    """And the bytes that it takes in all, as the compiler has laid them out; 0 if it does not say.

    `memory_analysis` counts some temporaries of TPU programs with loops twice: of 20b on v5p 2x2x2 16.7 GB for 11.1.
    """
    with tempfile.TemporaryDirectory() as reports:
        compiled = lowered.compile(compiler_options={"xla_dump_to": reports})
        text = "".join(report.read_text() for report in Path(reports).glob("*memory-usage-report.txt"))
    return compiled, laid_out(text)


def laid_out(report: str) -> int:
    """Bytes of a device's own memory in XLA's report on the use of it; 0 if it does not say."""
    found = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", report)
    return int(found[1]) if found else 0


def _placed(a: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _placed_as(a: jax.ShapeDtypeStruct, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    assert like.sharding is not None
    return _placed(a, like.sharding)


def _used(error: Exception, arguments: int) -> int:
    """As the compiler says it when it refuses what is too large: all of it, or the temporaries alone."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error)):
        return int(float(found[1]) * units[found[2]])
    if found := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", str(error)):
        return arguments + int(float(found[1]) * units[found[2]])
    raise error


def _nbytes(tree: Any) -> int:
    """Of the part of each array that is on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def changes(plan: Plan) -> list[tuple[str, Plan]]:
    """What may make it fit, the cheapest first."""
    found, count = [], rows_of(plan.mesh)
    if plan.cfg.remat != "block":
        plan = dataclasses.replace(plan, cfg=dataclasses.replace(plan.cfg, remat="block"))
        found.append(("--remat block", plan))
    if plan.batch > count:
        plan = dataclasses.replace(plan, batch=count)
        found.append((f"--batch {count}", plan))
    if plan.cfg.param_dtype == "float32":
        plan = dataclasses.replace(plan, cfg=dataclasses.replace(plan.cfg, param_dtype="bfloat16"))
        found.append(("--param-dtype bfloat16", plan))
    if not plan.lora:
        packed = dataclasses.replace(plan.cfg, param_dtype="mxfp4")
        plan = dataclasses.replace(plan, cfg=packed, lora=(r".*(q|k|v|o)_proj",))
        found.append(("--param-dtype mxfp4 --lora '.*(q|k|v|o)_proj'", plan))
    return found


def tell(plan: Plan, found: Cost, chip: Chip | None) -> str:
    room = "" if chip is None else f" of {size(chip.memory)}: {'fits' if found.used <= chip.memory else 'does not fit'}"
    if not found.arguments:
        return f"memory a chip     {size(found.used)}{room}"
    lines = [
        f"memory a chip     arguments {size(found.arguments)} + temporaries {size(found.temporaries)} + outputs"
        f" {size(found.outputs)} - donated {size(found.donated)} = {size(found.used)}{room}"
        + ("" if found.laid_out else "; as memory_analysis counts, or less")
    ]
    kinds: dict[str, list[int]] = {}
    for one in found.sent:
        total = kinds.setdefault(one.kind, [0, 0])
        total[0], total[1] = total[0] + one.nbytes * one.times, total[1] + one.times
    lines += [f"{kind:<17} {size(nbytes)} a step in {times}" for kind, (nbytes, times) in kinds.items()]
    lines += [f"                  {size(one.nbytes * one.times)}: {one.times} × {one.shape}" for one in found.sent[:3]]
    by_kind = flops(plan.cfg, plan.batch, plan.length, lora=bool(plan.lora))
    share = ", ".join(f"{name} {count / sum(by_kind.values()):.0%}" for name, count in by_kind.items())
    lines.append(f"compute           {found.flops / 1e12:.1f} TFLOP a chip and step ({share})")
    lines += to_experts(plan)
    if chip is not None:
        sent = sum(one.sent for one in found.sent)
        bounds = {
            "compute": found.flops / chip.flops,
            "memory": (found.arguments + found.outputs) / chip.bandwidth,
            "network": sent / chip.network,
        }
        worst = max(bounds, key=lambda name: bounds[name])
        each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in bounds.items())
        speed = plan.batch * plan.length / bounds[worst]
        lines.append(
            f"a step            at least {bounds[worst]:.2f} s ({each}): bound by {worst}, at most {speed:,.0f} tokens/s"
        )
    lines.append(f"compiled          in {found.seconds:.0f} s, {found.cpu_seconds:.0f} s of CPU")
    return "\n".join(lines)


def to_experts(plan: Plan) -> list[str]:
    """What tokens take that go to the devices of their experts, beside gathering them; nothing without an `expert` axis."""
    mesh = dict(plan.mesh)
    if mesh.get("expert", 1) == 1:
        return []
    cut = mesh_axes(partition_specs(plan.cfg, mesh)["layers.0.mlp.gate_up.bias"], 0)
    devices, tokens = math.prod(mesh[axis] for axis in cut), plan.batch * plan.length // math.prod(mesh.values())
    room = capacity(tokens, plan.cfg, devices)
    exchanged, gathered = (
        size((devices - 1) * rows * plan.cfg.hidden_size * np.dtype(plan.cfg.dtype).itemsize) for rows in (room, tokens)
    )
    way = f"sent to their experts {exchanged}, gathered {gathered}" if room < tokens else f"gathered {gathered}"
    return [f"tokens to experts {way} a layer"]


def axes(_context, _option, text: str) -> tuple[tuple[str, int], ...]:
    if not re.fullmatch(r"\w+=[1-9]\d*(,\w+=[1-9]\d*)*", text):
        raise click.BadParameter(f"expected axes and sizes such as fsdp=16,expert=4, found {text!r}")
    return tuple((name, int(count)) for name, count in (part.split("=") for part in text.split(",")))


AT_LEAST_1 = click.IntRange(min=1)
DTYPES, REMATS = click.Choice(["float32", "bfloat16", "mxfp4"]), click.Choice(["none", "mlp", "block"])


@click.command(help=(__doc__ or "").replace("\\b", "\b"), context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size", "model", type=click.Choice(["tiny", "20b", "120b"]), default="20b", show_default=True, help="Of gpt-oss."
)
@click.option("--layers", type=AT_LEAST_1, metavar="N", help="Fewer than the model has.")
@click.option(
    "--topology", metavar="KIND:SHAPE", required=True, help="v5p:2x2x2, v5e:4x8, v6e:16x16, ...; cpu:8 for simulated devices."
)
@click.option("--mesh", metavar="AXES", required=True, callback=axes, help="Axes and sizes, such as fsdp=16,expert=4.")
@click.option("--length", type=AT_LEAST_1, metavar="N", default=4096, show_default=True, help="Tokens a row.")
@click.option(
    "--batch",
    type=AT_LEAST_1,
    metavar="N",
    help="Rows a step, on all devices together. [default: one a device, and one for those that share a row by context]",
)
@click.option("--param-dtype", type=DTYPES, default="float32", show_default=True, help="What parameters are held in.")
@click.option("--remat", type=REMATS, default="block", show_default=True, help="What backward computes again.")
@click.option("--lora", multiple=True, metavar="REGEX", callback=pattern, help="Modules to adapt; may be repeated.")
@click.option("--rank", default=16, show_default=True, type=AT_LEAST_1, metavar="N", help="Of the LoRA updates.")
@click.option("--train", "chosen", default=".*", show_default=True, metavar="REGEX", callback=pattern, help="Without --lora.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--search/--no-search", default=True, help="Where it does not fit, compile what may.", show_default=True)
@click.version_option(package_name="convert-oss", message="%(prog)s %(version)s")
def main(model, layers, topology, mesh, length, batch, param_dtype, remat, lora, rank, chosen, as_json, search) -> int:
    cfg = {"tiny": ModelConfig.tiny, "20b": ModelConfig.gpt_oss_20b, "120b": ModelConfig.gpt_oss_120b}[model]()
    kind = topology.partition(":")[0]
    # What "auto" is on a TPU; asked for by name, since the machine that compiles is none.
    on_tpu = "grouped" if param_dtype == "mxfp4" else "ragged"
    how = {"remat": remat, "param_dtype": param_dtype, "expert_path": "auto" if kind == "cpu" else on_tpu}
    if layers is not None:
        how |= {"num_hidden_layers": layers, "layer_types": ()}
    cfg = dataclasses.replace(cfg, **how)
    if length > cfg.max_position_embeddings:
        raise InputError(f"--length: expected at most {cfg.max_position_embeddings} (max_position_embeddings), found {length}")
    if param_dtype == "mxfp4" and not lora:
        raise InputError("--param-dtype mxfp4: expected --lora beside it, since packed experts cannot be trained, found none")
    plan = Plan(cfg, topology, mesh, batch or rows_of(mesh), length, lora, rank, chosen)
    chip, found = CHIPS.get(kind), cost(plan)
    fits = chip is None or found.used <= chip.memory
    if as_json:
        asked = {"size": model, "layers": cfg.num_hidden_layers, "topology": topology, "mesh": dict(mesh), "length": length}
        asked |= {"batch": plan.batch, "param_dtype": param_dtype, "remat": remat, "lora": list(lora), "fits": fits}
        cost_ = dataclasses.asdict(found) | {"sent": [one._asdict() | {"bytes_sent": one.sent} for one in found.sent]}
        click.echo(json.dumps(asked | cost_))
        return 0 if fits else 1
    where = ", ".join(f"{name} {count}" for name, count in mesh)
    what = f"low-rank updates of {', '.join(lora)}" if lora else f"parameters that match {chosen!r}"
    click.echo(
        f"gpt-oss {model}, {cfg.num_hidden_layers} layers, {plan.batch} rows × {length} tokens on {topology}, mesh {where};"
    )
    click.echo(f"trained: {what}; parameters as {param_dtype}, remat {remat}, experts {cfg.expert_path}")
    click.echo(tell(plan, found, chip))
    if fits or not search:
        return 0 if fits else 1
    for option, other in changes(plan):
        more = cost(other)
        assert chip is not None
        click.echo(f"\nwith {option}\n{tell(other, more, chip)}")
        if more.used <= chip.memory:
            break
    return 1


if __name__ == "__main__":
    sys.exit(run_click(main, "plan_training.py"))
