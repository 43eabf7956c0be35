"""The chunk grid against the meshes: a process that reads its share reads no more, by arithmetic, for both models."""

import itertools
import math

import pytest

from oss_model import ModelConfig, layouts
from oss_model.sharding import mesh_axes, partition_specs

MODELS = {"20b": ModelConfig.gpt_oss_20b(), "120b": ModelConfig.gpt_oss_120b()}


def read_over_share(cfg: ModelConfig, mesh: dict[str, int]) -> tuple[float, float]:
    """Bytes of the chunks that a device's part of every parameter touches, and bytes of it held: each over an even share."""
    touched = held = total = 0
    specs, axes = partition_specs(cfg, mesh), layouts.parameter_axes(cfg)
    for name, (shape, dtype) in layouts.parameters(cfg).items():
        parts = [math.prod(mesh[cut] for cut in mesh_axes(specs[name], axis)) for axis in range(len(shape))]
        nbytes, first = math.prod(shape) * dtype.itemsize, shape[0] // parts[0]
        rows = layouts.chunk_rows(name, axes[name], shape, dtype)
        chunks = max(math.ceil(((part + 1) * first) / rows) - part * first // rows for part in range(parts[0]))
        touched += nbytes * min(chunks * rows, shape[0]) // shape[0]
        held += nbytes // math.prod(parts)
        total += nbytes
    share = total / math.prod(mesh.values())
    return touched / share, held / share


FSDP = [{"fsdp": 2**n} for n in range(1, 10)]


def name(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


@pytest.mark.parametrize("model", MODELS)
def test_up_to_eight_devices_nothing_is_held_twice_and_what_is_read_twice_is_small(model):
    """Of `fsdp` and `tensor`: `expert` cuts the experts alone, and replicates the rest."""
    meshes = [{"fsdp": a, "tensor": b} for a, b in itertools.product((1, 2, 4, 8), repeat=2)]
    for mesh in (mesh for mesh in meshes if 2 <= math.prod(mesh.values()) <= 8):
        read, held = read_over_share(MODELS[model], mesh)
        assert held < 1.03, name(mesh)
        # Chunks cannot be read in part, and `tensor` cuts inner axes of the experts, that are whole in theirs.
        assert read < 1.06 * mesh["tensor"], name(mesh)


@pytest.mark.parametrize(("model", "held"), [("20b", [1] * 6 + [121, 256, 512]), ("120b", [1] * 6 + [2, 256, 512])])
def test_how_far_fsdp_goes(model, held):
    """What divides no axis is replicated: from some size on, everything is. docs/training.md says from which."""
    assert [round(read_over_share(MODELS[model], mesh)[1]) for mesh in FSDP] == held


@pytest.mark.parametrize(("model", "most"), [("20b", 32), ("120b", 64)])
def test_how_far_fsdp_reads_no_more_than_its_share(model, most):
    for mesh in FSDP:
        read = read_over_share(MODELS[model], mesh)[0]
        assert (read < 1.25) == (mesh["fsdp"] <= most), name(mesh)
