"""The loop of training: steps, held-out loss, a log, and a state that a killed run is taken up from."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from oss_model.errors import InputError
from oss_model.files import write_file
from oss_model.lora import named_before, named_now
from oss_model.modeling import Transformer
from oss_model.scanned import ScannedTransformer, period, repeats, scanned, unscanned
from oss_model.training.costs import chip_of, flops
from oss_model.training.data import Data, put
from oss_model.training.router import dead, evenness
from oss_model.training.steps import Batch, Stepped, eval_step, optimizer, schedule, train_step


def _tree(directory: Path) -> Any:
    """What the state of a step is made of."""
    return ocp.PyTreeCheckpointHandler().metadata((directory / "default").absolute()).tree  # type: ignore[arg-type]


def _one_each(directory: Path, turn: int) -> bool:
    """Whether the state of a step has parameters of a layer beyond the first turn, and so is not stacked."""
    return max(map(int, _tree(directory)["params"].get("layers", {})), default=0) >= turn


def restore_step(manager: ocp.CheckpointManager, directory: Path, step: int, like: dict) -> Any:
    """The state of a step, placed as `like` says; of runs begun when LoRA parameters had other names, too."""
    leaves = jax.tree_util.tree_flatten_with_path(_tree(directory))[0]
    before = any("lora_a" in jax.tree_util.keystr(path) for path, _ in leaves)

    def renamed(rename, tree):
        states = lambda node: isinstance(node, nnx.State)  # noqa: E731
        return jax.tree.map(lambda node: rename(node) if states(node) else node, tree, is_leaf=states)

    if not before:
        return manager.restore(step, args=ocp.args.StandardRestore(like))
    return renamed(named_now, manager.restore(step, args=ocp.args.StandardRestore(renamed(named_before, like))))


class Log:
    """RUN/log.jsonl, a line a step, by one process; what a killed run wrote after its last saved step is taken back.

    TensorBoard's files too (RUN/tensorboard), where tensorboardX is installed.
    """

    def __init__(self, run: Path, done: int):
        self.file, self.writes, self.board = run / "log.jsonl", jax.process_index() == 0, None
        if self.writes:
            before = self.file.read_text().splitlines() if self.file.exists() else []
            write_file(self.file, "".join(f"{line}\n" for line in before if _step(line) <= done).encode(), durable=True)
            with contextlib.suppress(ModuleNotFoundError):
                from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

                self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def add(self, step: int, values: dict[str, Any]) -> None:
        if self.writes:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, step)


def _step(line: str) -> float:
    """Of a line of the log; a kill may have cut the last one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is trained.

    Attributes:
      steps: at the end.
      learning_rate: the highest; `schedule` with `warmup` makes the others.
      clip: the gradient's global norm.
      weight_decay: of matrices (AdamW).
      accumulate: into how many parts a batch is cut (`train_step`).
      balance: weight of `load_balancing_loss`.
      save_every: steps; held-out text is looked at then.
      keep: of the steps saved, the last so many.
      best: the result is of the saved step with the lowest held-out loss, which is kept too.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup: int = 10
    schedule: str = "constant"
    clip: float = 1.0
    weight_decay: float = 0.0
    accumulate: int = 1
    balance: float = 0.0
    save_every: int = 50
    keep: int = 1
    best: bool = False

    @property
    def rate(self) -> optax.Schedule:
        return schedule(self.learning_rate, self.steps, self.warmup, self.schedule)

    def manager(self, directory: Path, scored: bool) -> ocp.CheckpointManager:
        """Of the states in `directory`, each `scored` by the held-out loss, or none."""

        def held_out_loss(metrics: dict[str, float]) -> float:
            return metrics["held_out_loss"]

        lowest = BestN(get_metric_fn=held_out_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=self.save_every,
            preservation_policy=AnyPreservationPolicy(policies=[LatestN(self.keep), *([lowest] if self.best else [])]),
            best_fn=held_out_loss if scored else None,  # Orbax warns of steps without
            best_mode="min",
        )
        return ocp.CheckpointManager(directory.absolute(), options=options)


class Meter:
    """Losses and speed, said and logged now and then: in between nothing is waited for.

    Args:
      tokens: of a step.
      flops: of a step on one device.
    """

    def __init__(self, log: Log, say: Callable[[str], None], rate: optax.Schedule, tokens: int, flops: float):
        self.log, self.say, self.rate, self.tokens, self.flops = log, say, rate, tokens, flops
        self.chip = chip_of(jax.devices()[0].device_kind)
        self.waiting: list[tuple[int, Stepped]] = []
        self.compiled, self.start = False, time.perf_counter()

    def add(self, step: int, found: Stepped) -> None:
        self.waiting.append((step, found))

    def read(self) -> None:
        """What has been added, once it is computed."""
        step, last = self.waiting[-1]
        loss, seconds = float(last.loss), time.perf_counter() - self.start
        speed: dict[str, float] = {}
        if self.compiled:
            speed["tokens_per_second"] = len(self.waiting) * self.tokens / seconds
            if self.chip is not None:
                speed["mfu"] = len(self.waiting) * self.flops / (seconds * self.chip.flops)
        for at, found in self.waiting:
            rate = float(np.asarray(self.rate(at - 1)))
            values = {"loss": float(found.loss), "gradient_norm": float(found.norm), "learning_rate": rate}
            self.log.add(at, values | (speed if at == step else {}))
        told = f"{speed['tokens_per_second']:,.0f} tokens/s" if speed else f"{seconds:.1f} s, compiling included"
        self.say(f"step {step:5}   loss {loss:.4f}   {told}" + (f"   {speed['mfu']:.1%} MFU" if "mfu" in speed else ""))
        self.waiting.clear()
        self.compiled = True
        self.go()

    def go(self) -> None:
        """Time counts from here."""
        self.start = time.perf_counter()


def train(
    model: Transformer,
    trained: Any,
    data: Data,
    held_out: Data | None,
    how: Training,
    mesh: Mesh,
    run: Path,
    say: Callable[[str], None] = print,
) -> Transformer:
    """The model after all steps, or of the best; its state is kept in RUN/steps, and taken up from there.

    Args:
      model: its parameters are moved; the model to use is the one that is returned.
      trained: a filter of `flax.nnx`.
      held_out: text to look at, or none.
      say: gets a line at a time.

    Raises:
      InputError: if RUN has done more steps already.
    """
    rate, work = how.rate, flops(model.cfg, data.batch, data.length, lora=trained is nnx.LoRAParam)
    descent = optimizer(rate, how.clip, how.weight_decay)
    everywhere = NamedSharding(mesh, PartitionSpec())  # the optimizer's step counts; its moments are where the parameters are
    with how.manager(run / "steps", held_out is not None) as manager, jax.set_mesh(mesh):
        done = manager.latest_step() or 0
        if done > how.steps:
            raise InputError(f"--steps: expected {done} or more, which {run} has done already, found {how.steps}")
        if repeats(model, trained) and not (done and _one_each(run / "steps" / str(done), period(model.cfg.layer_types))):
            model = scanned(model)  # a run that was begun with a layer each goes on so
        graphdef, params, frozen = nnx.split(model, trained, ...)
        del model  # which would hold what is replaced
        moments = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), descent.init(params))

        # What comes out of a step is placed as what went in; frozen parameters go in only.
        placed = jax.tree.map(lambda a: a.sharding, (params, moments))
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "moments": moments})
        step_of = train_step(graphdef, descent, how.accumulate, how.balance)
        compiled = jax.jit(step_of, donate_argnums=(0, 1), out_shardings=(*placed, everywhere))
        looked_at = jax.jit(eval_step(graphdef), out_shardings=everywhere)

        def restored(step: int) -> tuple[Any, Any]:
            found = restore_step(manager, run / "steps" / str(step), step, like)
            return found["params"], found["moments"]

        if done:
            params = moments = None  # not beside what takes their place
            params, moments = restored(done)
            say(f"resumed after step {done}")
        log = Log(run, done)
        meter = Meter(log, say, rate, data.batch * data.length, sum(work.values()) / mesh.size)
        for step in range(done + 1, how.steps + 1):
            params, moments, found = compiled(params, moments, frozen, put(data(step), mesh, how.accumulate))
            meter.add(step, found)
            saves = step % how.save_every == 0 or step == how.steps
            if step == done + 1 or step % 10 == 0 or saves:
                meter.read()
            if saves:
                metrics = None
                if held_out is not None:
                    metrics = evaluate(lambda batch: looked_at(params, frozen, put(batch, mesh)), held_out)  # noqa: B023
                    log.add(step, metrics)
                    say(f"step {step:5}   {said(metrics)}")
                    metrics = {"held_out_loss": metrics["held_out_loss"]}
                manager.save(
                    step,
                    args=ocp.args.StandardSave({"params": params, "moments": moments}),
                    metrics=metrics,
                    force=step == how.steps,
                )
                meter.go()
        manager.wait_until_finished()
        if how.best and (best := manager.best_step()) is not None:
            say(f"the result is that of step {best}, whose held-out loss is the lowest")
            if best != how.steps:
                params = restored(best)[0]
        model = nnx.merge(graphdef, params, frozen)
        del params, frozen, moments  # what is still wanted is in the model
        return unscanned(model) if isinstance(model, ScannedTransformer) else model


def evaluate(look: Callable[[Batch], tuple[Any, Any, Any]], held_out: Data) -> dict[str, Any]:
    """Of text that is not trained on: the mean loss of what counts, and how evenly each layer's experts are used.

    Args:
      look: `eval_step`, compiled, of a batch.
    """
    loss, count, load = 0.0, 0.0, np.zeros((), np.int64)
    for batch in held_out.all():
        found = look(batch)
        loss, count, load = loss + float(found[0]), count + float(found[1]), load + np.asarray(found[2])
    even, unused = evenness(load).tolist(), dead(load).tolist()
    return {"held_out_loss": loss / max(count, 1.0), "router_evenness": even, "dead_experts": unused}


def said(metrics: dict[str, Any]) -> str:
    """Of `evaluate`, in a line."""
    unused = metrics["dead_experts"]
    idle = f", {sum(unused)} experts unused in {sum(count > 0 for count in unused)} layers" if any(unused) else ""
    return f"held-out loss {metrics['held_out_loss']:.4f}   router at least {min(metrics['router_evenness']):.2f} even{idle}"
