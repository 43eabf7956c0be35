"""The table: the layouts of checkpoints <-> the model's parameters, as data.

A row says which tensor of a checkpoint holds which parameter of the model, and how their axes correspond, as an
einops pattern read from the checkpoint to the model. Read backwards, the same row writes a checkpoint. Sizes of
the axes come from `ModelConfig.axes`, so every row knows the shape it expects on both sides.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import einops
import ml_dtypes
import numpy as np

from oss_model.config import ModelConfig
from oss_model.errors import InputError

BFLOAT16, FLOAT32, UINT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Row:
    """One correspondence. `{n}` stands for the layer number.

    `before` names the axes of what lies above this parameter along the first axis of a fused tensor:
    in OpenAI's qkv, the keys start below "(heads dim)" rows. `spread` names an axis that there are tensors of their own
    for, one for each `{part}`: the experts by number, or the two halves of the gated unit by name.
    """

    checkpoint: str
    model: str
    pattern: str
    before: tuple[str, ...] = ()
    packed: bool = False  # MXFP4 bytes (uint8) rather than floating point
    spread: str = ""


def _attention(name: str, of: dict[str, str]) -> list[Row]:
    """q, k, v and o of the layouts that keep them apart; `of` maps our names to the checkpoint's."""
    return [
        Row(f"{name}.{of[proj]}.{leaf}", f"layers.{{n}}.attn.{proj}.{leaf}", pattern)
        for proj, weight, bias in (
            ("q_proj", "(heads dim) hidden -> heads dim hidden", "(heads dim) -> heads dim"),
            ("k_proj", "(kv dim) hidden -> kv dim hidden", "(kv dim) -> kv dim"),
            ("v_proj", "(kv dim) hidden -> kv dim hidden", "(kv dim) -> kv dim"),
            ("o_proj", "hidden (heads dim) -> hidden heads dim", "hidden -> hidden"),
        )
        if proj in of
        for leaf, pattern in (("weight", weight), ("bias", bias))
    ]


def _packed_experts(gate_up: str, down: str) -> list[Row]:
    """Rows of gate_up are interleaved, even = gate and odd = up, in every layout: `(inner glu)`."""
    return [
        Row(f"{gate_up}blocks", "layers.{n}.mlp.gate_up.blocks",
            "experts (inner glu) hidden_groups bytes -> experts glu inner hidden_groups bytes", packed=True),
        Row(f"{gate_up}scales", "layers.{n}.mlp.gate_up.scales",
            "experts (inner glu) hidden_groups -> experts glu inner hidden_groups", packed=True),
        Row(f"{down}blocks", "layers.{n}.mlp.down.blocks",
            "experts hidden inner_groups bytes -> experts hidden inner_groups bytes", packed=True),
        Row(f"{down}scales", "layers.{n}.mlp.down.scales",
            "experts hidden inner_groups -> experts hidden inner_groups", packed=True),
    ]  # fmt: skip


_GATE_UP_BIAS, _DOWN_BIAS = "experts (inner glu) -> experts glu inner", "experts hidden -> experts hidden"
_HF = "model.layers.{n}"
_OPENAI = "block.{n}"

_HF_COMMON = (
    Row("model.embed_tokens.weight", "embedding.weight", "vocab hidden -> vocab hidden"),
    Row(f"{_HF}.input_layernorm.weight", "layers.{n}.attn.norm.scale", "hidden -> hidden"),
    Row(f"{_HF}.self_attn.sinks", "layers.{n}.attn.sinks", "heads -> heads"),
    *_attention(f"{_HF}.self_attn", {proj: proj for proj in ("q_proj", "k_proj", "v_proj", "o_proj")}),
    Row(f"{_HF}.post_attention_layernorm.weight", "layers.{n}.mlp.norm.scale", "hidden -> hidden"),
    Row(f"{_HF}.mlp.router.weight", "layers.{n}.mlp.router.weight", "experts hidden -> experts hidden"),
    Row(f"{_HF}.mlp.router.bias", "layers.{n}.mlp.router.bias", "experts -> experts"),
    Row(f"{_HF}.mlp.experts.gate_up_proj_bias", "layers.{n}.mlp.gate_up.bias", _GATE_UP_BIAS),
    Row(f"{_HF}.mlp.experts.down_proj_bias", "layers.{n}.mlp.down.bias", _DOWN_BIAS),
    Row("model.norm.weight", "norm.scale", "hidden -> hidden"),
    Row("lm_head.weight", "lm_head.weight", "vocab hidden -> vocab hidden"),
)
# Experts that are stored for x @ W: they are transposed back to [experts, out, in].
_HF_BF16_EXPERTS = (
    Row(f"{_HF}.mlp.experts.gate_up_proj", "layers.{n}.mlp.gate_up.weight",
        "experts hidden (inner glu) -> experts glu inner hidden"),
    Row(f"{_HF}.mlp.experts.down_proj", "layers.{n}.mlp.down.weight", "experts inner hidden -> experts hidden inner"),
)  # fmt: skip
_GATE_UP_OUT_IN = "experts (inner glu) hidden -> experts glu inner hidden"
_DOWN_OUT_IN = "experts hidden inner -> experts hidden inner"


def _other_experts(rows: Iterable[Row], change: dict[str, Row]) -> tuple[Row, ...]:
    """`rows`, those that hold the parameters of `change` replaced: by a part of a layer's name -> row."""
    names = {f"layers.{{n}}.mlp.{name}": row for name, row in change.items()}
    return tuple(names.get(row.model, row) for row in rows)


_ABOVE = {"q": (), "k": ("(heads dim)",), "v": ("(heads dim)", "(kv dim)")}  # qkv is fused along its rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    Attributes:
      title: for people; it begins with the name.
      foreign: whether parity's reference cannot read it: neither transformers nor `parity.reference`, which rewrites the
        configuration of OpenAI's for it.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    foreign: bool = False

    @property
    def packed(self) -> bool:
        return any(row.packed for row in self.rows)


HF_MXFP4 = Layout(
    "hf",
    "Hugging Face, MXFP4",
    _HF_COMMON + tuple(_packed_experts(f"{_HF}.mlp.experts.gate_up_proj_", f"{_HF}.mlp.experts.down_proj_")),
)
HF_BF16 = Layout("hf-bf16", "Hugging Face, bfloat16", _HF_COMMON + _HF_BF16_EXPERTS)
# What the save_pretrained of transformers 5.5.2 to 5.23 writes after a dequantized load: the bfloat16 layout, whose
# experts are wrongly named `*_blocks`. Only their dtype and rank tell; there are no `*_scales`.
HF_BF16_MISNAMED = Layout(
    "hf-bf16-misnamed",
    "Hugging Face, bfloat16 with experts named *_blocks",
    _HF_COMMON + tuple(dataclasses.replace(row, checkpoint=row.checkpoint + "_blocks") for row in _HF_BF16_EXPERTS),
)
# What torchtitan saves: the same names, and the experts as they are stored for W·x. The shape of gate_up tells.
TORCHTITAN = Layout(
    "torchtitan",
    "torchtitan's, bfloat16 with experts [out, in] named *_blocks",
    _other_experts(
        _HF_COMMON + _HF_BF16_EXPERTS,
        {
            "gate_up.weight": Row(f"{_HF}.mlp.experts.gate_up_proj_blocks", "layers.{n}.mlp.gate_up.weight", _GATE_UP_OUT_IN),
            "down.weight": Row(f"{_HF}.mlp.experts.down_proj_blocks", "layers.{n}.mlp.down.weight", _DOWN_OUT_IN),
        },
    ),
    foreign=True,
)


def _each(name: str, model: str, pattern: str) -> Row:
    return Row(f"{_HF}.mlp.experts.{name}", f"layers.{{n}}.mlp.{model}", pattern, spread="experts")


# unsloth's unfused class: a linear map an expert, its rows interleaved as everywhere.
UNSLOTH = Layout(
    "unsloth",
    "unsloth's, bfloat16 with a tensor an expert",
    _other_experts(
        _HF_COMMON + _HF_BF16_EXPERTS,
        {
            "gate_up.weight": _each("gate_up_projs.{part}.weight", "gate_up.weight", _GATE_UP_OUT_IN),
            "gate_up.bias": _each("gate_up_projs.{part}.bias", "gate_up.bias", _GATE_UP_BIAS),
            "down.weight": _each("down_projs.{part}.weight", "down.weight", _DOWN_OUT_IN),
            "down.bias": _each("down_projs.{part}.bias", "down.bias", _DOWN_BIAS),
            "router.weight": Row(
                f"{_HF}.mlp.router.linear.weight", "layers.{n}.mlp.router.weight", "experts hidden -> experts hidden"
            ),
            "router.bias": Row(f"{_HF}.mlp.router.linear.bias", "layers.{n}.mlp.router.bias", "experts -> experts"),
        },
    ),
    foreign=True,
)


def _halves(leaf: str, axes: str) -> Row:
    return Row(f"{_HF}.mlp.experts.{{part}}_proj.{leaf}", f"layers.{{n}}.mlp.gate_up.{leaf}", f"{axes} -> {axes}", spread="glu")


MLX = Layout(
    "mlx",
    "mlx-lm's, bfloat16 with gate and up apart",
    _other_experts(
        _HF_COMMON + _HF_BF16_EXPERTS,
        {
            "gate_up.weight": _halves("weight", "experts glu inner hidden"),
            "gate_up.bias": _halves("bias", "experts glu inner"),
            "down.weight": Row(
                f"{_HF}.mlp.experts.down_proj.weight",
                "layers.{n}.mlp.down.weight",
                "experts hidden inner -> experts hidden inner",
            ),
            "down.bias": Row(f"{_HF}.mlp.experts.down_proj.bias", "layers.{n}.mlp.down.bias", _DOWN_BIAS),
        },
    ),
    foreign=True,
)
OPENAI = Layout(
    "openai",
    "OpenAI original",
    (
        Row("embedding.weight", "embedding.weight", "vocab hidden -> vocab hidden"),
        Row(f"{_OPENAI}.attn.norm.scale", "layers.{n}.attn.norm.scale", "hidden -> hidden"),
        Row(f"{_OPENAI}.attn.sinks", "layers.{n}.attn.sinks", "heads -> heads"),
        *(
            dataclasses.replace(row, before=_ABOVE[row.model.split(".attn.")[1][0]])
            for row in _attention(f"{_OPENAI}.attn", {f"{part}_proj": "qkv" for part in "qkv"})
        ),
        *_attention(f"{_OPENAI}.attn", {"o_proj": "out"}),
        Row(f"{_OPENAI}.mlp.norm.scale", "layers.{n}.mlp.norm.scale", "hidden -> hidden"),
        Row(f"{_OPENAI}.mlp.gate.weight", "layers.{n}.mlp.router.weight", "experts hidden -> experts hidden"),
        Row(f"{_OPENAI}.mlp.gate.bias", "layers.{n}.mlp.router.bias", "experts -> experts"),
        Row(f"{_OPENAI}.mlp.mlp1_bias", "layers.{n}.mlp.gate_up.bias", _GATE_UP_BIAS),
        Row(f"{_OPENAI}.mlp.mlp2_bias", "layers.{n}.mlp.down.bias", _DOWN_BIAS),
        *_packed_experts(f"{_OPENAI}.mlp.mlp1_weight.", f"{_OPENAI}.mlp.mlp2_weight."),
        Row("norm.scale", "norm.scale", "hidden -> hidden"),
        Row("unembedding.weight", "lm_head.weight", "vocab hidden -> vocab hidden"),
    ),
)
LAYOUTS = {layout.name: layout for layout in (HF_MXFP4, HF_BF16, HF_BF16_MISNAMED, OPENAI, TORCHTITAN, UNSLOTH, MLX)}


def _as_the_model(layout: Layout, title: str) -> Layout:
    """An Orbax checkpoint, as a row a parameter: nothing is moved."""
    sides = {row: row.pattern.split(" -> ")[1] for row in layout.rows}
    rows = (dataclasses.replace(row, checkpoint=row.model, pattern=f"{side} -> {side}") for row, side in sides.items())
    return Layout("orbax", title, tuple(rows))


ORBAX, ORBAX_MXFP4 = _as_the_model(HF_BF16, "Orbax"), _as_the_model(HF_MXFP4, "Orbax, experts packed")


# --- rows with their sizes filled in ----------------------------------------------------------------------------


def _groups(side: str) -> list[list[str]]:
    """'(heads dim) hidden' -> [['heads', 'dim'], ['hidden']]"""
    return [found.strip("()").split() for found in re.findall(r"\([^)]*\)|\S+", side)]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A `Row` of one layer of one model: names and shapes are final, and arrays can be taken through it."""

    checkpoint: str
    model: str
    pattern: str
    packed: bool
    axes: dict[str, int]
    start: int  # first row of this parameter in the checkpoint's tensor; not 0 only in a fused tensor
    spread: str = ""  # an axis that there are tensors of their own for

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that hold it: one, or those along `spread`."""
        if not self.spread:
            return [self.checkpoint]
        parts = ("gate", "up") if self.spread == "glu" else range(self.axes[self.spread])
        return [self.checkpoint.format(part=part) for part in parts]

    def _shape(self, side: int) -> tuple[int, ...]:
        return tuple(math.prod(self.axes[a] for a in group) for group in _groups(self.pattern.split("->")[side]))

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape of this parameter's part of the checkpoint's tensor: all of it, unless it is fused."""
        return self._shape(0)

    @property
    def model_shape(self) -> tuple[int, ...]:
        return self._shape(1)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the axes, in C order, of the checkpoint's tensor, those of a group one by one. The first is the model's."""
        return tuple(re.findall(r"\w+", self.pattern.split("->")[0]))

    def split(self, part: np.ndarray) -> np.ndarray:
        """A checkpoint's array, or a run of its first axis, with an axis for each of `order`: a view."""
        return part.reshape(-1, *(self.axes[axis] for axis in self.order[1:]))

    @property
    def rows(self) -> slice:
        """Where this parameter lies along the first axis of the checkpoint's tensor."""
        return slice(self.start, self.start + self.checkpoint_shape[0])

    def to_model(self, part: np.ndarray) -> np.ndarray:
        """A checkpoint's array -> the parameter. Also takes a run of leading `experts` (a view where axes only split)."""
        return self._rearrange(part, self.pattern)

    def to_checkpoint(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `to_model`: the same pattern, read backwards."""
        return self._rearrange(parameter, " -> ".join(reversed(self.pattern.split(" -> "))))

    def _rearrange(self, array: np.ndarray, pattern: str) -> np.ndarray:
        lead = pattern.split()[0].lstrip("(")
        sizes = {axis: size for axis, size in self.axes.items() if axis in re.findall(r"\w+", pattern) and axis != lead}
        return einops.rearrange(array, pattern, **sizes)


def entries(layout: Layout, cfg: ModelConfig) -> list[Entry]:
    """Every row of `layout` for every layer of `cfg`, in the order of the model: embedding, layers, norm, lm_head."""
    axes = cfg.axes
    first, per_layer, last = [], [], []
    for row in layout.rows:
        (per_layer if "{n}" in row.model else first if row.model.startswith("embedding") else last).append(row)
    expanded = [(row, None) for row in first]
    expanded += [(row, n) for n in range(cfg.num_hidden_layers) for row in per_layer]
    expanded += [(row, None) for row in last]
    return [
        Entry(
            checkpoint=row.checkpoint.format(n=n, part="{part}"),
            model=row.model.format(n=n),
            pattern=row.pattern,
            packed=row.packed,
            axes=axes,
            start=sum(math.prod(axes[a] for a in _groups(group)[0]) for group in row.before),
            spread=row.spread,
        )
        for row, n in expanded
    ]


def checkpoint_shapes(layout: Layout, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a complete checkpoint has; parts of a fused tensor are added up along its rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(layout, cfg):
        if entry.spread:
            axis, shape = entry.order.index(entry.spread), entry.checkpoint_shape  # no group is before it
            shapes |= dict.fromkeys(entry.tensors, (*shape[:axis], *shape[axis + 1 :]))
            continue
        above = shapes.get(entry.checkpoint, (0,))[0]
        shapes[entry.checkpoint] = (above + entry.checkpoint_shape[0], *entry.checkpoint_shape[1:])
    return shapes


def _model_entries(cfg: ModelConfig) -> list[Entry]:
    """Entries of the layout that has `Transformer(cfg)`'s parameters one for one."""
    return entries(HF_MXFP4 if cfg.param_dtype == "mxfp4" else HF_BF16, cfg)


def parameter_axes(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Name -> names of the axes of every parameter of `Transformer(cfg)`."""
    return {e.model: tuple(axis for group in _groups(e.pattern.split("->")[1]) for axis in group) for e in _model_entries(cfg)}


def parameters(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of every parameter of `Transformer(cfg)`: what an Orbax checkpoint of it holds."""
    floating = FLOAT32 if cfg.param_dtype == "float32" else BFLOAT16
    return {e.model: (e.model_shape, UINT8 if e.packed else floating) for e in _model_entries(cfg)}


@functools.lru_cache(maxsize=8)
def linear_maps(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weight of every linear map, which LoRA can adapt."""
    weights = {e.model.removesuffix(".weight"): e.model_shape for e in entries(ORBAX, cfg) if e.model.endswith(".weight")}
    return {name: shape for name, shape in weights.items() if name != "embedding"}


def lora_shapes(name: str, cfg: ModelConfig, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B of the map `name`: the axes of its input go to A, the others to B; an expert has its own."""
    shape = linear_maps(cfg)[name]
    outputs = len(shape) - (2 if name.endswith("o_proj") else 1)
    experts = shape[:1] if name.endswith((".gate_up", ".down")) else ()
    return (*experts, rank, *shape[outputs:]), (*shape[:outputs], rank)


# --- recognising and checking a checkpoint ----------------------------------------------------------------------


def recognise(tensors: dict[str, tuple[tuple[int, ...], str]]) -> Layout | None:
    """Which layout has these tensors (name -> shape, safetensors dtype)? None if it is no gpt-oss checkpoint."""
    if any(name.startswith("block.") for name in tensors):
        return OPENAI
    if not any(name.startswith("model.layers.") for name in tensors):
        return None
    for part, layout in ((".mlp.experts.gate_up_projs.", UNSLOTH), (".mlp.experts.gate_proj.", MLX)):
        if any(part in name for name in tensors):
            return layout
    blocks = [(shape, dtype) for name, (shape, dtype) in tensors.items() if name.endswith("_proj_blocks")]
    if not blocks:
        return HF_BF16
    if any(name.endswith("_proj_scales") for name in tensors) or any(dtype == "U8" for _, dtype in blocks):
        return HF_MXFP4
    hidden = tensors.get("model.embed_tokens.weight", ((), ""))[0][-1:]
    gate_up = next((shape for name, (shape, _) in tensors.items() if name.endswith("gate_up_proj_blocks")), ())
    return TORCHTITAN if gate_up[-1:] == hidden != gate_up[1:2] else HF_BF16_MISNAMED


def check(tensors: dict[str, tuple[tuple[int, ...], str]], layout: Layout, cfg: ModelConfig, where: str) -> list[str]:
    """Compare what a checkpoint has (name -> shape, safetensors dtype) with what `cfg` needs; one line a fault."""
    if layout.packed:
        try:
            dataclasses.replace(cfg, param_dtype="mxfp4")
        except InputError as e:
            return [f"{where}: {fault}" for fault in e.faults]
    packed = {e.checkpoint for e in entries(layout, cfg) if e.packed}
    expected = checkpoint_shapes(layout, cfg)
    faults = [f"{where}: {name}: missing; {layout.title} needs it" for name in expected if name not in tensors]
    for name, (shape, dtype) in tensors.items():
        if name not in expected:
            faults.append(f"{where}: {name}: unexpected; config.json and the layout ({layout.title}) have no such tensor")
            continue
        wanted = ("U8",) if name in packed else ("BF16", "F32")
        if dtype not in wanted:
            faults.append(f"{where}: {name}: expected dtype {' or '.join(wanted)}, found {dtype}")
        if tuple(shape) != expected[name]:
            faults.append(f"{where}: {name}: expected shape {list(expected[name])} by config.json, found {list(shape)}")
    return faults


def not_a_checkpoint(where: str, names: Iterable[str]) -> InputError:
    some = ", ".join(sorted(names)[:3])
    return InputError(f"{where}: expected the tensors of a gpt-oss checkpoint, found {some or 'none'}; is this another model?")


def parameter_name(path: tuple) -> str:
    """A path in `nnx.state(model)` as the name used in `oss_model.layouts`: layers.0.attn.sinks"""
    return ".".join(str(part) for part in path)


# --- the chunk grid ---------------------------------------------------------------------------------------------

BLOCK_BYTES = 32 << 20  # of a vocabulary that is cut into blocks of rows: large enough to stream, small enough to hold
WHOLE_BYTES = 8 << 20  # a matrix larger than this is cut into PARTS, so that as many processes can read a share each
PARTS = 8


def chunk_rows(name: str, axes: Sequence[str], shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many rows of a parameter's first axis one chunk of the checkpoint holds: all other axes are whole.

    One expert, about 32 MB of a vocabulary, an eighth of a large matrix, or everything. `oss_model.sharding` cuts first
    axes too, so that a process reads its share and no more.
    """
    first, *rest = shape
    if axes[0] == "experts" and len(rest) > 1 and not name.endswith("bias"):
        return 1
    if axes[0] != "vocab":
        large = math.prod(shape) * dtype.itemsize > WHOLE_BYTES
        return first // PARTS if large and first % PARTS == 0 else first
    most = max(1, BLOCK_BYTES // (math.prod(rest) * dtype.itemsize))
    # A divisor leaves no partial chunk to fill up with zeros, and shards evenly: 201088 = 32 * 6284.
    divisors = [rows for rows in range(most // 2, most * 3 // 2 + 1) if rows and first % rows == 0]
    return min(divisors, key=lambda rows: abs(rows - most)) if divisors else min(most, first)
