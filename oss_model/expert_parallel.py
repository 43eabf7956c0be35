"""Who computes what on a mesh: each device its own experts, for all tokens that are routed to them."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from oss_model import sharding
from oss_model.config import ModelConfig
from oss_model.expert_paths import add_up
from oss_model.gathering import gather, scatter_sum

if TYPE_CHECKING:
    from oss_model.experts import ExpertLinear


def add_up_on_mesh(
    x, choice, weights, gate_up: "ExpertLinear", down: "ExpertLinear", cfg: ModelConfig, mesh_shape: dict[str, int]
) -> Array:
    """Each device computes its own experts, or its slice of their inner axis, for every token that is routed to them.

    - On a mesh without `expert`, what `fsdp` and `context` cut is gathered, a layer at a time, and tokens stay.
    - Over the axes that cut experts a token goes to each device that has any of its own, and their sums come back
      (`exchanged`); where that would send no fewer rows, tokens are gathered and their sums scattered.
    - Over those that cut within an expert tokens are gathered likewise. Those of `fsdp` and `context` that cut the tokens, too,
      have the weights gathered instead, if a device has fewer bytes of these.
    """
    tokens = sharding.activation_spec("blh", x.shape, mesh_shape)
    choice, weights = (a.reshape(*x.shape[:2], -1) for a in (choice, weights))
    stored = gate_up.stored(), down.stored()
    specs = tuple({name: linear.specs(cfg, mesh_shape)[name] for name in linear.stored()} for linear in (gate_up, down))
    of_experts, of_inner = (sharding.mesh_axes(specs[0]["bias"], axis) for axis in (0, -1))
    gathered = tuple(a for a in (*of_experts, *of_inner) if a in sharding.SHARES)
    if "expert" in of_experts:
        of_tokens = [a for n in range(len(tokens)) for a in sharding.mesh_axes(tokens, n)]
        parts, rows = (math.prod(mesh_shape[a] for a in axes) for axes in ((*of_experts, *of_inner), of_tokens))
        weights_here = sum(a.nbytes for a in jax.tree.leaves(stored)) / parts
        tokens_here = x.size / rows * (x.dtype.itemsize + 4)  # there in their own dtype, their sums back in float32
        gathered = tuple(a for a in gathered if a in of_inner and a in of_tokens) if weights_here < tokens_here else ()
    of_experts, of_inner = (tuple(a for a in axes if a not in gathered) for axes in (of_experts, of_inner))
    # Along these the tokens travel; along the others, of the same tokens, sums are added up in place.
    token_axes = tuple(a for n in (0, 1) for a in sharding.mesh_axes(tokens, n) if a in of_experts + of_inner)
    sum_axes = tuple(a for a in of_experts + of_inner if a not in token_axes)
    to_experts = tuple(a for a in of_experts if a in token_axes)

    def whole(array: Array, spec: PartitionSpec) -> Array:
        for axis in range(len(spec)):
            if shares := tuple(a for a in sharding.mesh_axes(spec, axis) if a in gathered):
                array = gather(array, shares, axis)
        return array

    def local(x, choice, weights, *stored):
        shape = x.shape
        x, choice, weights = (a.reshape(-1, a.shape[-1]) for a in (x, choice, weights))
        gate_up, down = jax.tree.map(whole, stored, specs)
        if of_inner:  # the bias of the sum is one device's to add
            down["bias"] = down["bias"] * (jax.lax.axis_index(of_inner) == 0).astype(down["bias"].dtype)
        count = down["bias"].shape[0]

        def add(x, choice, weights, gate_up, down):
            if of_experts:
                choice = choice - jax.lax.axis_index(of_experts) * count
            if count < choice.shape[1]:  # of a token's experts no more than `count` are here: leave the others out
                here = (choice >= 0) & (choice < count)
                kept = jnp.argsort(~here, axis=1, stable=True)[:, :count]
                choice, weights = (jnp.take_along_axis(a, kept, axis=1) for a in (choice, weights))
            return add_up(x, choice, weights, gate_up, down, cfg)

        rows = x.shape[0] * math.prod(mesh_shape[a] for a in token_axes if a not in to_experts)
        room = capacity(rows, cfg, math.prod(mesh_shape[a] for a in of_experts))
        travel = to_experts if room < rows else ()
        gathering = tuple(a for a in token_axes if a not in travel)
        if gathering:
            x, choice, weights = (gather(a, gathering) for a in (x, choice, weights))
        if travel:
            # Which of the devices along `travel` has an expert; none where it is along the other axes that its owner differs.
            sizes = [mesh_shape[a] for a in of_experts]
            owners = dict(zip(of_experts, jnp.unravel_index(choice // count, sizes), strict=True))
            owner = jnp.ravel_multi_index([owners[a] for a in travel], [mesh_shape[a] for a in travel], mode="clip")
            for a in of_experts:
                if a not in travel:
                    owner = jnp.where(owners[a] == jax.lax.axis_index(a), owner, -1)
            total = exchanged(add, x, choice, weights, (gate_up, down), owner, travel, room)
        else:
            total = add(x, choice, weights, gate_up, down)
        total = jax.lax.psum(total, sum_axes) if sum_axes else total
        total = scatter_sum(total, gathering) if gathering else total
        return total.astype(x.dtype).reshape(shape)

    inputs = (tokens, tokens, tokens, *specs)
    # check_vma: the paths start their sums from zeros, which it would have them mark as different on every device.
    on_devices = jax.shard_map(local, in_specs=inputs, out_specs=tokens, check_vma=False)
    return on_devices(x, choice, weights, *stored)


def capacity(tokens: int, cfg: ModelConfig, devices: int) -> int:
    """How many of so many tokens are sent from one device to another at once.

    A quarter more than a balanced router sends: those that have any of their k experts among the other's own. As many as
    there are where it would be no fewer.
    """
    experts, k = cfg.num_experts, cfg.num_experts_per_tok
    none = math.comb(experts - experts // devices, k) / math.comb(experts, k)
    return min(math.ceil(1.25 * tokens * (1 - none)), tokens)


def exchanged(
    add: Callable[..., Array],
    x: Float[Array, "t h"],
    choice: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    stored: tuple[dict[str, Array], ...],
    owner: Int[Array, "t k"],
    axes: tuple[str, ...],
    room: int,
) -> Float[Array, "t h"]:
    """`add(x, choice, weights, *stored)`, each token's where its experts are: sent once to each device, and the sums sent back.

    What does not fit goes in further rounds, as many as the fullest device needs, so that no token is dropped.

    Args:
      owner: the device along `axes` that has an expert; -1 where none has.
      room: how many tokens go from one device to another in a round.
    """
    tokens, devices = x.shape[0], jax.lax.axis_size(axes)
    goes = (owner[:, :, None] == jnp.arange(devices, dtype=owner.dtype)[None, None]).any(axis=1).T  # [devices, tokens]
    rounds = -(-tokens // room)
    place = jnp.where(goes, jnp.cumsum(goes, axis=1, dtype=jnp.int32) - 1, rounds * room)
    queue = jnp.full((devices, rounds * room), tokens, jnp.int32)  # of each device the tokens that go there; then none
    queue = queue.at[jnp.arange(devices)[:, None], place].set(jnp.arange(tokens, dtype=jnp.int32)[None], mode="drop")
    fullest = jax.lax.pmax(goes.sum(axis=1, dtype=jnp.int32).max(), axes)
    moving, fixed = _by_gradient(stored)
    return _in_rounds(add, axes, room, (x, weights, *moving), fixed, choice, queue, (fullest + room - 1) // room)


def _by_gradient(stored):
    """Arrays that have a gradient, and bytes, which have none."""
    kinds = (jnp.floating, jnp.integer)
    return tuple([{n: a for n, a in one.items() if jnp.issubdtype(a.dtype, kind)} for one in stored] for kind in kinds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_rounds(add, axes, room, moving, fixed, choice, queue, rounds):
    """float32 [t, h]. A loop: conditionals could be differentiated, but in them XLA for TPUs compiles no grouped product."""

    def more(n, total):
        return total + _round(add, axes, room, n, moving, fixed, choice, queue)

    return jax.lax.fori_loop(0, rounds, more, jnp.zeros(moving[0].shape, jnp.float32))


def _round(add, axes, room, n, moving, fixed, choice, queue):
    x, weights, *stored = moving
    sent = jax.lax.dynamic_slice_in_dim(queue, n * room, room, axis=1).reshape(-1)

    def travel(a):
        return jax.lax.all_to_all(a, axes, split_axis=0, concat_axis=0, tiled=True)

    rows, weight = (a.at[sent].get(mode="fill", fill_value=0) for a in (x, weights))
    expert = choice.at[sent].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max // 2)
    whole = ({**a, **b} for a, b in zip(stored, fixed, strict=True))
    back = travel(add(travel(rows), travel(expert), travel(weight), *whole))
    return jnp.zeros(x.shape, jnp.float32).at[sent].add(back, mode="drop")


def _rounds_forward(add, axes, room, moving, fixed, choice, queue, rounds):
    return _in_rounds(add, axes, room, moving, fixed, choice, queue, rounds), (moving, fixed, choice, queue, rounds)


def _rounds_backward(add, axes, room, kept, slope):
    """Each round once more, and back; gradients are summed in float32."""
    moving, fixed, choice, queue, rounds = kept

    def more(n, total):
        _, back = jax.vjp(lambda moving: _round(add, axes, room, n, moving, fixed, choice, queue), moving)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, *back(slope))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), moving)
    total = jax.lax.fori_loop(0, rounds, more, zeros)
    return jax.tree.map(lambda a, like: a.astype(like.dtype), total, moving), None, None, None, None


_in_rounds.defvjp(_rounds_forward, _rounds_backward)
