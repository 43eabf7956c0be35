"""LoRA updates of a model, in the two forms that people keep them in: ours (`oss_model.lora`), and PEFT's directories.

PEFT (https://github.com/huggingface/peft, 0.21) names a tensor after the module of transformers. Of experts, parameters there,
it has one A and one B for all: A [experts · rank, in], the expert major, and B [out, rank · experts], the rank major. Two such
parameters of one module are wrapped one around the other, so that names do not say which is which: the shape of B does.
"""

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import einops
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from converter.errors import Different
from converter.orbax_source import stored_arrays
from oss_model.buckets import GsPath
from oss_model.config import ModelConfig
from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json, sync, write_file
from oss_model.layouts import linear_maps, lora_shapes
from oss_model.lora_note import NOTE, Noted, is_finite, is_rank, read_note, write_note

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TOP = "base_model.model."
EXPERTS = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


class Update(NamedTuple):
    """alpha / rank · B·A, float32. Of a linear map a [rank, *in] and b [*out, rank]; of experts' with the expert first."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file() or (directory / NOTE).is_file()


def read(directory: Path, cfg: ModelConfig, value: Callable[[str], np.ndarray] | None = None) -> dict[str, Update]:
    """Module -> its update, whole: updates are small.

    Args:
      cfg: of the model that they are of.
      value: gives a parameter of that model by name, to be compared with what an adapter has besides its updates.

    Raises:
      InputError: naming everything that is missing, unknown or misshaped: an update is read, or all of them are refused.
    """
    return _read_peft(directory, cfg, value) if (directory / CONFIG).is_file() else _read_ours(directory, cfg)


# --- ours -------------------------------------------------------------------------------------------------------


def _read_ours(directory: Path, cfg: ModelConfig) -> dict[str, Update]:
    noted = read_note(directory)
    if noted is None:
        if (directory / "config.json").is_file():
            raise InputError(f"{directory}: expected LoRA updates ({CONFIG} of PEFT, or {NOTE}), found a model")
        raise InputError(
            f"{directory / NOTE}: expected the ranks and alphas that save_lora notes, found no file; load the updates with"
            " oss_model.load_lora, and save them anew with save_lora"
        )
    found = {name.removesuffix(".value"): array for name, array in stored_arrays(directory).items()}
    known = {f"{name}.lora.{part}" for name in noted for part in "ab"}
    strange = sorted(found.keys() - known)
    faults = [f"{directory}: {name}: expected to be noted in {NOTE}, found no such update there" for name in strange]
    updates = {}
    for name, about in noted.items():
        pair = [found.get(f"{name}.lora.{part}") for part in "ab"]
        if name not in linear_maps(cfg):
            faults.append(f"{directory}: {name}: expected a linear map of the model, found none of this name")
            continue
        if None in pair:
            faults.append(f"{directory}: {name}: expected lora.a and lora.b, found {'one' if any(pair) else 'none'} of them")
            continue
        a, b = (np.asarray(array.read(), np.float32) for array in pair if array is not None)
        wrong = _misfit(directory, name, cfg, a.shape, b.shape, about.rank)
        faults += wrong
        if not wrong:
            updates[name] = Update(a, b, about.alpha)
    raise_all(sorted(faults))
    return updates


def write_ours(directory: Path, updates: Mapping[str, Update]) -> None:
    """As `oss_model.save_lora` does."""
    import orbax.checkpoint as ocp

    tree: dict = {}
    for name, update in updates.items():
        node = tree
        for part in (*name.split("."), "lora"):
            node = node.setdefault(part, {})
        node |= {"a": {"value": update.a}, "b": {"value": update.b}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), tree)
    write_note(directory, {name: Noted(update.rank, update.alpha) for name, update in updates.items()})


def _misfit(directory: Path, name: str, cfg: ModelConfig, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> list[str]:
    wanted = lora_shapes(name, cfg, rank)
    return [] if (a, b) == wanted else [f"{directory}: {name}: expected shapes {list(wanted)}, found {[a, b]}"]


# --- PEFT's -----------------------------------------------------------------------------------------------------

# Keys of adapter_config.json that change what is computed, with the only value that is implemented.
_ONLY = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
         "lora_bias": False, "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None,
         "use_qalora": False, "arrow_config": None, "kasa_config": None, "velora_config": None, "monteclora_config": None,
         "use_bdlora": None, "megatron_config": None}  # fmt: skip
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# What is of training alone, or said by the tensors' names too.
_HARMLESS = {"auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
             "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
             "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
             "target_modules", "target_parameters", "task_type"}  # fmt: skip


def _read_peft(directory: Path, cfg: ModelConfig, value: Callable[[str], np.ndarray] | None) -> dict[str, Update]:
    about, tensors = peft_config(directory), peft_tensors(directory)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    faults = []
    for name, tensor in tensors.items():
        if (found := re.fullmatch(rf"{re.escape(TOP)}(.+)\.lora_([AB])\.weight", name)) is not None:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif name.removeprefix(TOP) in ("lm_head.base_layer.weight", "model.embed_tokens.base_layer.weight"):
            faults += _changed(directory, name, tensor, value)
        else:
            faults.append(
                f"{directory / TENSORS}: {name}: expected lora_A or lora_B of a linear map, found this; it is not implemented"
            )
    updates = {}
    for module, pair in sorted(pairs.items()):
        where = f"{directory / TENSORS}: {TOP}{module}"
        if pair.keys() != {"A", "B"}:
            faults.append(f"{where}: expected lora_A and lora_B, found one of them")
            continue
        name = _our_name(module, pair["B"].shape[0], cfg)
        if name is None:
            faults.append(f"{where}: expected a linear map of gpt-oss in transformers, found none of this name")
            continue
        experts = cfg.num_experts if name.endswith(("gate_up", "down")) else 1
        rank, rest = divmod(pair["B"].shape[1], experts)
        a, b = lora_shapes(name, cfg, rank)
        each = max(1, experts * rank)
        wanted = [(experts * rank, math.prod(a) // each), (math.prod(b) // each, rank * experts)]
        if rest or [pair["A"].shape, pair["B"].shape] != wanted:
            faults.append(f"{where}: expected shapes {wanted}, found {[pair['A'].shape, pair['B'].shape]}")
            continue
        updates[name] = _from_peft(name, pair["A"], pair["B"], cfg, _alpha(about, module, rank))
    raise_all(faults or ([] if updates else [f"{directory / TENSORS}: expected LoRA updates, found none"]))
    return updates


def peft_config(directory: Path) -> dict[str, Any]:
    """
    Raises:
      InputError: naming every key that is unknown, or asks for something that is not implemented.
    """
    try:
        about = dict(parse_json((directory / CONFIG).read_bytes()))
        faults = []
        for key, only in _ONLY.items():
            if (found := about.get(key, only)) != only and found not in ([], {}):
                faults.append(f"{directory / CONFIG}: {key}: only {only!r} is implemented, found {found!r}")
        for key in sorted(about.keys() - _ONLY.keys() - _READ - _HARMLESS):
            faults.append(f"{directory / CONFIG}: {key}: not a key of LoRA that is known here; it may change the updates")
        numbers = {"r": is_rank, "lora_alpha": is_finite}
        wrong = [f"{key} {str(about.get(key))[:80]}" for key, fits in numbers.items() if not fits(about.get(key))]
        for key, fits in (("rank_pattern", is_rank), ("alpha_pattern", is_finite)):
            patterns = about.get(key) or {}
            wrong += [f"{key} {str(value)[:80]} of {name}" for name, value in dict(patterns).items() if not fits(value)]
            for pattern in patterns:
                re.compile(pattern)
        if wrong:
            faults.append(f"{directory / CONFIG}: expected ranks from 1 on and finite alphas, found {', '.join(wrong)}")
    except (OSError, ValueError, TypeError, re.error) as e:
        raise InputError(
            f"{directory / CONFIG}: expected the JSON object of a PEFT adapter, found something else ({e})"
        ) from None
    raise_all(faults)
    return about


def peft_tensors(directory: Path) -> dict[str, np.ndarray]:
    """
    Raises:
      InputError: if there are none, or they are damaged.
    """
    import ml_dtypes  # noqa: F401  so that safetensors knows bfloat16

    path = directory / TENSORS
    if not path.is_file():
        raise InputError(f"{path}: expected the tensors of a PEFT adapter, found no file; .bin files are not read")
    try:
        with _on_disk(path) as here, safe_open(here, framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: expected a whole safetensors file, found a truncated or damaged one ({e})") from None


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[Path]:
    """The file; of an object a copy, since updates are small."""
    if not isinstance(path, GsPath):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="convert-oss-") as scratch:
        copy = Path(scratch) / path.name
        copy.write_bytes(path.read_bytes())
        yield copy


def _changed(directory: Path, name: str, tensor: np.ndarray, value: Callable[[str], np.ndarray] | None) -> list[str]:
    """PEFT saves the matrices at the ends too, changed or not: one that is not the model's own was trained as a whole."""
    ours = "lm_head.weight" if "lm_head" in name else "embedding.weight"
    if value is None:
        return [f"{directory / TENSORS}: {name}: expected updates alone, found a whole matrix; say whose it is: --base DIR"]
    own = value(ours)
    if own.shape == tensor.shape and np.array_equal(own.astype(np.float32), tensor.astype(np.float32)):
        return []
    return [
        f"{directory / TENSORS}: {name}: expected the model's own {ours}, found another; trained matrices are not implemented"
    ]


def peft_value(about: Mapping[str, Any], what: str, module: str) -> float:
    """`r` or `lora_alpha` of a module, by the patterns that adapter_config.json has for some."""
    patterns = about.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[what]) or {}
    key = next((key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    return about[what] if key is None else patterns[key]


def _alpha(about: Mapping[str, Any], module: str, rank: int) -> float:
    """Such that alpha / rank is PEFT's scaling of this module."""
    alpha = float(peft_value(about, "lora_alpha", module))
    return alpha * math.sqrt(rank) if about.get("use_rslora") else alpha


def _our_name(module: str, out: int, cfg: ModelConfig) -> str | None:
    if module == "lm_head":
        return module
    found = re.fullmatch(r"model\.layers\.(\d+)\.(self_attn\.([qkvo]_proj)|mlp\.router|mlp\.experts(\.base_layer)?)", module)
    if found is None or int(found[1]) >= cfg.num_hidden_layers:
        return None
    layer = f"layers.{found[1]}"
    if found[3]:
        return f"{layer}.attn.{found[3]}"
    if found[2] == "mlp.router":
        return f"{layer}.mlp.router"
    return f"{layer}.mlp.{'gate_up' if out == 2 * cfg.intermediate_size else 'down'}"


def _from_peft(name: str, a: np.ndarray, b: np.ndarray, cfg: ModelConfig, alpha: float) -> Update:
    a, b = (np.ascontiguousarray(one, np.float32) for one in (a, b))
    if name.endswith(("gate_up", "down")):
        a = einops.rearrange(a, "(e r) i -> e r i", e=cfg.num_experts)
        glu = 2 if name.endswith("gate_up") else 1
        b = einops.rearrange(b, "(o glu) (r e) -> e glu o r", e=cfg.num_experts, glu=glu)
        return Update(a, np.ascontiguousarray(b if glu == 2 else b[:, 0]), alpha)
    shapes = lora_shapes(name, cfg, len(a))
    return Update(a.reshape(shapes[0]), b.reshape(shapes[1]), alpha)


def _to_peft(name: str, update: Update) -> tuple[np.ndarray, np.ndarray]:
    if name.endswith(("gate_up", "down")):
        b = update.b if name.endswith("gate_up") else update.b[:, None]
        return einops.rearrange(update.a, "e r i -> (e r) i"), einops.rearrange(b, "e glu o r -> (o glu) (r e)")
    return update.a.reshape(update.rank, -1), update.b.reshape(-1, update.rank)


def write_peft(directory: Path, updates: Mapping[str, Update], base: str | None) -> None:
    """A directory that `peft.PeftModel.from_pretrained` loads.

    Args:
      base: the model that they are of, to be noted.
    """
    tensors, ranks, alphas, modules, parameters = {}, {}, {}, set(), set()
    both = {name.rpartition(".")[0] for name in updates if name.endswith("gate_up")} & {
        name.rpartition(".")[0] for name in updates if name.endswith("down")
    }
    for name, update in updates.items():
        layer, _, kind = name.rpartition(".")
        theirs = name.replace("layers.", "model.layers.").replace(".attn.", ".self_attn.")
        key = theirs
        if kind in EXPERTS:
            key = f"{layer.replace('layers.', 'model.layers.')}.experts.{kind}_proj"
            theirs = key.rpartition(".")[0] + (".base_layer" if kind == "gate_up" and layer in both else "")
            parameters.add(f"mlp.experts.{kind}_proj")
        elif kind == "router":
            key = f"{theirs}.weight"
            parameters.add("mlp.router.weight")
        else:
            modules.add(theirs)
        ranks[key], alphas[key] = update.rank, update.alpha
        for part, tensor in zip("AB", _to_peft(name, update), strict=True):
            tensors[f"{TOP}{theirs}.lora_{part}.weight"] = np.ascontiguousarray(tensor)
    rank, alpha = (max(found.values(), key=list(found.values()).count) for found in (ranks, alphas))
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none", "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "rank_pattern": {key: found for key, found in sorted(ranks.items()) if found != rank},
        "alpha_pattern": {key: found for key, found in sorted(alphas.items()) if found != alpha},
        "target_modules": sorted(modules), "target_parameters": sorted(parameters, reverse=True) or None,
    }  # fmt: skip
    directory.mkdir()
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
    sync(directory / TENSORS)
    write_file(directory / CONFIG, json.dumps(about, indent=2).encode() + b"\n")


# --- from one form to the other ---------------------------------------------------------------------------------


def convert_adapter(src: Path, dst: Path, to: str, base: Path | None = None) -> list[str]:
    """Write the updates in `src`, of either form, to `dst` in the form `to`. Returns the names of the modules adapted.

    Args:
      base: the model that they are of: safetensors or Orbax. A PEFT directory may name it itself, as a directory.

    Raises:
      InputError: if an update cannot be read, there is something at `dst`, or nothing says how large the model is.
    """
    from converter.source import open_checkpoint

    if not is_adapter(src):
        raise InputError(f"{src}: expected LoRA updates ({CONFIG} of PEFT, or {NOTE} of save_lora), found neither")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError(f"{dst}: expected a new or empty directory, found something; give another name")
    named = _named_base(src)
    place = base or (Path(named) if named and Path(named).is_dir() else None)
    if place is None:
        raise InputError(f"{src}: expected the model that it is of, for its sizes, found {named or 'none'}; --base DIR")
    with contextlib.closing(open_checkpoint(place)) as model:
        entries = {entry.model: entry for entry in model.entries()}
        updates = read(src, model.cfg, lambda name: model.read(entries[name]))
        cfg = model.cfg
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{dst.name}.partial-", dir=dst.parent) as scratch:
        made = Path(scratch) / "made"
        if to == "peft":
            write_peft(made, updates, named or str(place))
        else:
            write_ours(made, updates)
        again = read(made, cfg)
        if again.keys() != updates.keys() or any(not _same(again[name], update) for name, update in updates.items()):
            raise Different([f"{made}: what was written is not what was read; the disk may be broken"])
        if dst.exists():
            dst.rmdir()
        made.rename(dst)
        sync(dst.parent)
    return list(updates)


def _same(one: Update, other: Update) -> bool:
    return one.alpha == other.alpha and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)


def _named_base(src: Path) -> str | None:
    try:
        return parse_json((src / CONFIG).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
