"""The catalogue of known mistakes: what ports and converters of gpt-oss got wrong (and of models like it).

A row says in words what is wrong, and, of a mistake in the code, how: as a wrong equation, by which it is recognised. Those
in parameters are `parity.mistakes.edits`. `parity.injection.blocks` and `parity.injection.files` make each on the side
that is judged, to test the harness. docs/faults.md is the page a person reads.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from parity import equations as eq
from parity.mistakes import wrong_equations as wrong
from parity.mistakes.wrong_equations import Wrong
from parity.protocols import Settings


class Fault(NamedTuple):
    """A known mistake.

    Attributes:
      name: in the reports, in docs/faults.md and in the tables of what does it.
      tap: the first one that shows it; "weights" for what is wrong in the checkpoint.
      where: "layer", "sliding" or "full" (layers of that type), or "model" (outside the layers).
      says: the diagnosis, a sentence. What it says of the port is what was measured with this very number, or is said to
        be consistent with it; {window} and its like are the reference's own (`sentence`).
      seen: in what kind of port, or how it comes about.
      fix: what to do.
      wrong: the mistake itself, of one in the code.
      equivalent: why it changes nothing that can be measured in float32; empty if it does.
    """

    name: str
    tap: str
    where: str
    says: str
    seen: str
    fix: str
    equivalent: str = ""
    wrong: Wrong | None = None


def _layer(tap: str, *rows: tuple[str, str, str, str, Wrong]) -> list[Fault]:
    return [Fault(name, tap, "layer", says, seen, fix, wrong=row) for name, says, seen, fix, row in rows]


CODE: list[Fault] = [
    *_layer(
        "attn_norm",
        ("norm-one-plus-scale", "RMSNorm multiplies by 1 + scale, should be scale", "code of Gemma", "multiply by the stored scale",
         wrong.parameter(lambda v: v.astype(np.float64) + 1, "attn.norm.scale")),
        ("norm-unscaled", "RMSNorm leaves its scale out", "a scale that was never loaded", "multiply by the stored scale",
         wrong.parameter(np.ones_like, "attn.norm.scale")),
        ("norm-mean-subtracted", "the norm subtracts the mean: LayerNorm, should be RMSNorm", "code of GPT-2", "use RMSNorm",
         wrong.norm(wrong.mean_subtracted)),
        ("norm-missing", "the norm is left out", "post-norm code", "normalise before attention and before the experts",
         wrong.norm(lambda x, scale, s: x)),
        ("norm-scales-exchanged", "attention's and the experts' norm scales are exchanged",
         "names: input_layernorm is attention's", "map input_layernorm to attn.norm, post_attention_layernorm to mlp.norm",
         wrong.exchanged(("attn.norm.scale", "mlp.norm.scale"))),
        ("norm-sum-of-squares", "the norm divides by the root of the sum, should be of the mean", "L2 normalisation",
         "take the mean of the squares",
         wrong.norm(wrong.sum_of_squares)),
    ),
    *_layer("q",
        ("q-bias-missing", "q has no bias", "code of Llama, which has none", "add q_proj.bias",
         wrong.parameter(np.zeros_like, "attn.q_proj.bias")),
        ("q-heads-transposed", "q's rows are read as [head_dim, heads], should be [heads, head_dim]",
         "a reshape in the wrong order", "reshape rows to [heads, head_dim]",
         wrong.parameter(lambda v: wrong.heads_last(v, 0), "attn.q_proj.weight", "attn.q_proj.bias")),
    ),
    *_layer("k",
        ("k-bias-missing", "k has no bias", "code of Llama, or of Whisper, whose k has none", "add k_proj.bias",
         wrong.parameter(np.zeros_like, "attn.k_proj.bias")),
        ("k-v-exchanged", "k and v are exchanged", "a fused qkv split as q, v, k", "split as q, k, v",
         wrong.exchanged(("attn.k_proj.weight", "attn.v_proj.weight"), ("attn.k_proj.bias", "attn.v_proj.bias"))),
    ),
    *_layer("v", ("v-bias-missing", "v has no bias", "code of Llama, which has none", "add v_proj.bias",
                  wrong.parameter(np.zeros_like, "attn.v_proj.bias"))),
    *_layer("q_rope",
        ("rope-neighbours", "RoPE rotates neighbours (2i, 2i+1), should rotate halves (i, i + head_dim/2)",
         "code of GPT-J or of Meta's Llama", "split head_dim in two halves",
         wrong.rotated(wrong.neighbours)),
        ("rope-missing", "RoPE is not applied in this layer", "layers without positions, as in Llama 4 and SmolLM3",
         "rotate q and k in every layer",
         wrong.rotated(lambda x, cos, sin: x)),
        ("rope-backwards", "RoPE turns the other way", "the sign of sin", "o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin",
         wrong.rotated(lambda x, cos, sin: eq.rotate(x, cos, -sin))),
        ("rope-half-of-head", "RoPE rotates half of head_dim, should rotate all", "partial_rotary_factor of GPT-NeoX or Phi",
         "rotate all of head_dim",
         wrong.rotated(wrong.half_of_head)),
        ("rope-one-late", "positions start at 1, should start at 0", "positions from a cumulative sum of the mask",
         "subtract 1 from the sum",
         wrong.equation(wrong.one_late)),
    ),
    *_layer("q_rope", ("heads-normalised", "each head is normalised before RoPE", "code of Qwen3 or Gemma 3 (q_norm, k_norm)",
                       "rotate q and k as they are projected", wrong.rotated(wrong.heads_normalised))),
    *_layer("k_rope", ("yarn-concentration-not-on-k", "YaRN's concentration is multiplied into q alone, should be into q and k",
                       "a scale of attention's logits in place of the tables", "multiply cos and sin by it, for q and k",
                       wrong.equation(wrong.unconcentrated))),
    *_layer("k_rope", ("rope-not-on-k", "k is not rotated", "a cache that is filled before RoPE", "rotate k before it is stored",
                       wrong.equation(lambda t, p, s: t["k"]))),
    Fault("window-one-long", "attn_core", "sliding", "the sliding window is {longer}, should be {window}", "k >= q - window",
          "a query sees `window` keys, itself included: k > q - window",
          wrong=wrong.setting(window=lambda s: s["sliding_window"] + 1)),
    Fault("window-one-short", "attn_core", "sliding", "the sliding window is {shorter}, should be {window}", "counting the query itself apart",
          "a query sees `window` keys, itself included: k > q - window",
          wrong=wrong.setting(window=lambda s: s["sliding_window"] - 1)),
    Fault("window-half", "attn_core", "sliding", "the sliding window is {half}, half of {window}",
          "a window to both sides (flash-attention's window_size)", "give the window to the left only",
          wrong=wrong.setting(window=lambda s: s["sliding_window"] // 2)),
    Fault("window-missing", "attn_core", "sliding", "the sliding window is missing, or longer than the prompt: the layer sees everything before",
          "layer_types ignored, or read from odd layers", "even layers slide: take layer_types from the config",
          wrong=wrong.setting(window=None)),
    Fault("window-on-full-layer", "attn_core", "full", "a full-attention layer has the sliding window",
          "layer_types ignored, or read from odd layers", "odd layers see everything: take layer_types from the config",
          wrong=wrong.setting(window=lambda s: s["sliding_window"])),
    Fault("window-chunked", "attn_core", "sliding", "the layer sees its own chunk of {window} tokens, should see the {window} before",
          "chunked attention, as in Llama 4", "slide the window with the query",
          wrong=wrong.sees(lambda queries, keys, s: queries // s["sliding_window"] == keys // s["sliding_window"])),
    Fault("window-and-first-tokens", "attn_core", "sliding", "the layer sees the first 4 tokens besides its window",
          "attention sinks of StreamingLLM, which are tokens", "the sinks are parameters, one a head; the window is all it sees",
          wrong=wrong.sees(lambda queries, keys, s: (queries - keys < s["sliding_window"]) | (keys < 4))),
    *_layer("attn_core",
        ("rope-on-values", "v is rotated", "RoPE applied to the fused qkv", "rotate q and k only",
         wrong.equation(wrong.values_rotated)),
        ("attention-scale-hidden", "attention's logits are scaled by 1/sqrt(hidden), should be 1/sqrt(head_dim)",
         "the wrong size", "multiply by 1/sqrt(head_dim)",
         wrong.attention(lambda s, **given: {"scale": 1 / math.sqrt(s["hidden_size"])})),
        ("causal-mask-missing", "attention sees tokens that come later", "a mask of None", "mask keys after the query",
         wrong.mask(lambda behind: behind == behind)),
        ("self-not-seen", "a token does not see itself", "k < q in place of k <= q", "mask keys with k > q only",
         wrong.mask(lambda behind: behind > 0)),
        ("sinks-dropped", "the sinks are left out of the softmax", "a fused attention without them",
         "add sinks[head] as one more logit, and drop its column after the softmax",
         wrong.sinks(lambda v, s: np.full_like(v, -np.inf))),
        ("sinks-zeroed", "the sinks are all zero", "softmax-plus-one, or sinks that were never loaded", "load attn.sinks",
         wrong.sinks(lambda v, s: np.zeros_like(v))),
        ("sinks-negated", "the sinks have the wrong sign", "a sink subtracted from the logits", "append the sink as a logit",
         wrong.sinks(lambda v, s: -v)),
        ("sinks-head-order", "the sinks are in another order of heads", "heads as [groups, kv] in place of [kv, groups]",
         "head h belongs to kv head h // groups",
         wrong.sinks(wrong.kv_major)),
        ("sinks-scaled", "the sinks are multiplied by 1/sqrt(head_dim)", "the scale applied after the sink was appended",
         "scale q·k only",
         wrong.sinks(lambda v, s: v / math.sqrt(s["head_dim"]))),
        ("attention-unscaled", "attention's logits are not scaled", "a kernel that expects scaled queries",
         "multiply by 1/sqrt(head_dim)",
         wrong.attention(lambda s, **given: {"scale": 1.0})),
        ("attention-scale-head-dim", "attention's logits are scaled by 1/head_dim, should be 1/sqrt(head_dim)",
         "scaled twice", "multiply by 1/sqrt(head_dim) once",
         wrong.attention(lambda s, **given: {"scale": 1 / s["head_dim"]})),
        ("kv-heads-tiled", "query head h reads kv head h % kv, should be h // (heads / kv)", "tile in place of repeat",
         "repeat each kv head for its group of query heads",
         wrong.attention(wrong.tiled)),
    ),
    *_layer("attn_out",
        ("o-bias-missing", "attention's output has no bias", "code of Llama, which has none", "add o_proj.bias",
         wrong.parameter(np.zeros_like, "attn.o_proj.bias")),
        ("o-heads-transposed", "attention's output is flattened as [head_dim, heads], should be [heads, head_dim]",
         "a missing transposition before the projection", "flatten as [heads, head_dim]",
         wrong.parameter(lambda v: wrong.heads_last(v, 1), "attn.o_proj.weight")),
    ),
    *_layer("mlp_norm",
        ("attention-residual-missing", "the residual around attention is missing", "wiring of the block", "x + attention(norm(x))",
         wrong.equation(lambda t, p, s: eq.rms_norm(t["attn_out"], p["mlp.norm.scale"], s))),
        ("block-parallel", "the experts read the block's input, should read the stream after attention", "code of GPT-J or PaLM",
         "attention first, then the experts",
         wrong.equation(lambda t, p, s: eq.rms_norm(t["x"], p["mlp.norm.scale"], s))),
    ),
    *_layer("router_logits", ("router-bias-missing", "the router has no bias", "code of Mixtral, which has none", "add router.bias",
                              wrong.parameter(np.zeros_like, "mlp.router.bias"))),
    *_layer("expert_choice",
        ("router-top-k-less", "one expert too few is chosen", "experts_per_token", "take num_experts_per_tok from the config",
         wrong.chosen(lambda order, k: order[:, : k - 1])),
        ("router-top-k-more", "one expert too many is chosen", "experts_per_token", "take num_experts_per_tok from the config",
         wrong.chosen(lambda order, k: order[:, : k + 1])),
        ("router-lowest", "the experts of the lowest logits are chosen", "an ascending sort", "take the highest",
         wrong.chosen(lambda order, k: order[:, -k:])),
    ),
    *_layer("expert_weights",
        ("router-softmax-over-all", "expert weights are a softmax over all experts, not renormalised",
         "code of Mixtral or Qwen without norm_topk_prob", "softmax over the chosen experts only",
         wrong.weighed(lambda logits, choice: wrong.of_choice(eq.softmax(logits), choice))),
        ("router-sigmoid", "expert weights are sigmoids", "code of DeepSeek-V3 or Llama 4", "softmax over the chosen experts",
         wrong.weighed(lambda logits, choice: eq.sigmoid(wrong.of_choice(logits, choice)))),
        ("router-uniform", "every chosen expert has the same weight", "weights dropped on the way", "softmax over the chosen experts",
         wrong.weighed(lambda logits, choice: np.full(choice.shape, 1 / choice.shape[1]))),
        ("router-weights-reversed", "expert weights belong to the experts in the opposite order", "an ascending sort",
         "keep weights and experts in one order",
         wrong.weighed(lambda logits, choice: eq.softmax(wrong.of_choice(logits, choice))[:, ::-1])),
    ),
    *_layer("mlp_out",
        ("gate-up-exchanged", "gate and up are exchanged", "even rows are the gate, odd ones up", "gate = rows 0::2, up = rows 1::2",
         wrong.glu(lambda gate, up, s: eq.swiglu(up, gate, s))),
        ("gate-up-halves", "gate and up are split in halves, should be interleaved", "code of every other model",
         "gate = rows 0::2, up = rows 1::2",
         wrong.glu(wrong.halves)),
        ("swiglu-alpha-one", "consistent with swiglu's alpha being 1, should be {alpha}", "a plain SiLU", "gate * sigmoid(alpha * gate)",
         wrong.setting(swiglu_alpha=1.0)),
        ("swiglu-alpha-rounded", "swiglu's alpha is 1.7, should be {alpha}", "a rounded constant", "gate * sigmoid(alpha * gate)",
         wrong.setting(swiglu_alpha=1.7)),
        ("swiglu-no-plus-one", "swiglu lacks the + 1 on up", "a plain SwiGLU", "(up + 1) * gate * sigmoid(alpha * gate)",
         wrong.glu(wrong.no_plus_one)),
        ("swiglu-no-clamp", "swiglu does not clamp within what the prompt reaches", "a plain SwiGLU", "gate at most limit, up within ±limit",
         wrong.setting(swiglu_limit=math.inf)),
        ("swiglu-up-unclamped", "swiglu does not clamp up", "half of the clamp", "up within ±limit",
         wrong.unclamped(up=True)),
        ("swiglu-gate-unclamped", "swiglu does not clamp the gate", "half of the clamp", "gate at most limit",
         wrong.unclamped(gate=True)),
        ("swiglu-limit-ten", "consistent with swiglu's limit being 10, should be {limit}", "a hard-coded limit", "take swiglu_limit from the config",
         wrong.setting(swiglu_limit=10.0)),
        ("swiglu-gelu", "the gate goes through GELU, should be gate * sigmoid(alpha * gate)", "1.702 is also GELU's approximation",
         "use the sigmoid as it is",
         wrong.glu(wrong.gelu)),
        ("gate-up-bias-missing", "gate and up have no bias", "code of Mixtral, which has none", "add gate_up.bias",
         wrong.parameter(np.zeros_like, "mlp.gate_up.bias")),
        ("down-bias-missing", "the experts' output has no bias", "code of Mixtral, which has none", "add down.bias",
         wrong.parameter(np.zeros_like, "mlp.down.bias")),
        ("down-bias-unweighted", "the experts' output bias is not weighted by the router", "a bias added after the sum",
         "add down.bias before the weight",
         wrong.summed(wrong.bias_unweighted)),
        ("weights-before-experts", "expert weights multiply the experts' input, should multiply the output", "code of Llama 4",
         "weigh the output",
         wrong.summed(wrong.weights_before)),
        ("experts-full", "an expert takes no more tokens than its even share, the rest are dropped", "expert capacity of GShard or Switch",
         "gpt-oss drops no token: compute every chosen expert",
         wrong.summed(wrong.crowded_out)),
        ("weights-ignored", "expert weights are not applied", "a grouped product without them", "weigh each expert's output",
         wrong.summed(lambda add, x, choice, weights, p, s: add(x, choice, np.ones_like(weights)))),
        ("weights-averaged", "the experts' sum is divided by their number", "a mean in place of the sum", "add",
         wrong.summed(lambda add, x, choice, weights, p, s: add(x, choice, weights) / choice.shape[1])),
        ("experts-off-by-one", "every token goes to the expert after its own", "indices from 1, or a padded expert 0",
         "count experts from 0",
         wrong.summed(lambda add, x, choice, weights, p, s: add(x, (choice + 1) % s["num_experts"], weights))),
    ),
    *_layer("layer_out",
        ("mlp-residual-missing", "the residual around the experts is missing", "wiring of the block", "x + experts(norm(x))",
         wrong.equation(lambda t, p, s: t["mlp_out"])),
        ("mlp-residual-early", "the residual around the experts is the block's input, should be the stream after attention",
         "a variable reused", "add to the stream after attention",
         wrong.equation(lambda t, p, s: t["x"] + t["mlp_out"])),
    ),
]  # fmt: skip


def _model(tap: str, *rows: tuple[str, str, str, str, Wrong]) -> list[Fault]:
    return [Fault(name, tap, "model", says, seen, fix, wrong=row) for name, says, seen, fix, row in rows]


MODEL: list[Fault] = [
    *_model("rope",
        ("yarn-truncated", "YaRN's bounds are rounded (truncate), should not be", "the library's default where the config is silent; mlx-lm 0.32.2 always rounds",
         "keep truncate: false",
         wrong.setting(rope_truncate=True)),
        ("yarn-missing", "YaRN is missing: plain RoPE", "only one of rope_parameters and rope_scaling read", "read both dialects",
         wrong.setting(rope_factor=1.0)),
        ("yarn-linear", "every RoPE frequency is divided by the factor: position interpolation, should be YaRN",
         "rope_type linear", "interpolate by YaRN's ramp",
         wrong.equation(wrong.interpolated)),
        ("rope-theta", "consistent with a rope_theta of 10000, should be {theta}", "the default of other models", "take rope_theta from the config",
         wrong.setting(rope_theta=1e4)),
        ("yarn-concentration-missing", "YaRN's concentration is missing from cos and sin", "frequencies ported, the factor not",
         "multiply cos and sin by 0.1 ln(factor) + 1",
         wrong.tables(lambda cos, sin, s: (cos / eq.concentration(s), sin / eq.concentration(s)))),
        ("yarn-concentration-squared", "YaRN's concentration is applied twice", "to q·k, and to cos and sin too",
         "multiply cos and sin by it, once",
         wrong.tables(lambda cos, sin, s: (cos * eq.concentration(s), sin * eq.concentration(s)))),
        ("yarn-original-length", "YaRN counts from max_position_embeddings, should count from the original length",
         "original_max_position_embeddings not read", "take it from rope_scaling",
         wrong.setting(rope_original_max_position_embeddings=lambda s: s["max_position_embeddings"])),
        ("yarn-betas-exchanged", "YaRN's beta_fast and beta_slow are exchanged", "ntk_alpha is slow, ntk_beta is fast",
         "beta_fast 32, beta_slow 1",
         wrong.setting(rope_beta_fast=lambda s: s["rope_beta_slow"], rope_beta_slow=lambda s: s["rope_beta_fast"])),
    ),
    *_model("embedding",
        ("embedding-scaled", "the embedding is multiplied by sqrt(hidden)", "code of Gemma", "use it as it is",
         wrong.equation(lambda t, p, s: eq.embedding(t, p, s).astype(np.float64) * math.sqrt(s["hidden_size"]))),
        ("embedding-one-off", "token ids are shifted by one", "a padding row at 0", "look token t up at row t",
         wrong.equation(lambda t, p, s: eq.embedding({"tokens": (t["tokens"] + 1) % s["vocab_size"]}, p, s))),
    ),
    *_model("final_norm",
        ("final-norm-missing", "the last norm is left out", "hidden states taken before it", "normalise before lm_head",
         wrong.equation(lambda t, p, s: t["x"])),
        ("final-norm-one-plus-scale", "the last norm multiplies by 1 + scale", "code of Gemma", "multiply by the stored scale",
         wrong.parameter(lambda v: v.astype(np.float64) + 1, "norm.scale")),
        ("final-norm-unscaled", "the last norm leaves its scale out", "a scale that was never loaded", "multiply by norm.scale",
         wrong.parameter(np.ones_like, "norm.scale")),
    ),
    *_model("logits",
        ("lm-head-tied", "the logits come from the embedding, should come from lm_head", "tie_word_embeddings", "load lm_head.weight",
         wrong.tied("lm_head.weight", "embedding.weight")),
        ("logits-softcapped", "consistent with logits capped by 30 tanh(x / 30)", "code of Gemma 2", "leave them as they are",
         wrong.equation(lambda t, p, s: 30 * np.tanh(eq.logits(t, p, s) / 30))),
    ),
]  # fmt: skip


def _weights(*rows: tuple[str, str, str, str, str]) -> list[Fault]:
    return [Fault(name, "weights", where, says, seen, fix) for name, where, says, seen, fix in rows]


CHECKPOINT: list[Fault] = _weights(
    ("weight-transposed", "layer", "its last two axes are transposed", "W·x against x·W; square in the real models, so shapes fit",
     "transpose by layout, never by shape"),
    ("weight-one-block", "layer", "several values of one block of 32 are wrong, all others are right", "a damaged file, or a lost write",
     "verify-oss DST; convert again"),
    ("weight-zeroed", "layer", "it is all zeros", "a tensor that was never written", "verify-oss DST; convert again"),
    ("weight-rows-shifted", "layer", "its rows are shifted by one", "an offset into the file or into a fused tensor", "check the slices"),
    ("weight-bytes-swapped", "layer", "the two bytes of each value are exchanged", "endianness", "safetensors is little-endian"),
    ("weight-through-fp8", "layer", "its values were rounded to float8 (e4m3)", "a quantized copy used as the source",
     "convert from the MXFP4 or bfloat16 files"),
    ("bias-dropped", "layer", "it is all zeros", "a bias that was never loaded", "map every bias"),
    ("sinks-shifted", "layer", "the sinks are shifted by a head", "an offset into the heads", "head h has sinks[h]"),
    ("experts-permuted", "layer", "experts stand in another order", "files sorted by name: 10 before 2", "sort experts by number"),
    ("weight-gate-up-halves", "layer", "gate and up were split in halves, are interleaved", "layouts of other models",
     "gate = rows 0::2, up = rows 1::2"),
    ("weight-gate-up-exchanged", "layer", "gate and up are exchanged", "odd rows taken as the gate", "gate = rows 0::2, up = rows 1::2"),
    ("qkv-split-by-group", "layer", "the fused qkv was split by group of heads, should be all q, all k, all v",
     "GPT-NeoX's and Megatron's layout", "rows 0:heads·d are q, then k, then v"),
    ("qkv-k-v-exchanged", "layer", "k and v are exchanged", "a fused qkv split as q, v, k", "split as q, k, v"),
    ("q-k-for-neighbours", "layer", "rows of each head are permuted for a RoPE that rotates neighbours",
     "conversion scripts of Llama", "keep the rows: gpt-oss rotates halves"),
    ("norm-scales-swapped", "layer", "attention's and the experts' norm scales are exchanged",
     "names: input_layernorm is attention's", "map input_layernorm to attn.norm, post_attention_layernorm to mlp.norm"),
    ("layers-exchanged", "layer", "the layer holds another layer's parameters", "layers sorted by name: 10 before 2",
     "sort layers by number"),
    ("embedding-lm-head-swapped", "model", "the embedding and lm_head are exchanged", "two tensors of one shape", "go by name"),
    ("lm-head-is-embedding", "model", "lm_head is a copy of the embedding", "tie_word_embeddings", "load lm_head.weight"),
    ("embedding-is-lm-head", "model", "the embedding is a copy of lm_head", "tied the other way round", "load embedding.weight"),
    ("heads-transposed", "layer", "its rows are [head_dim, heads], should be [heads, head_dim]", "a reshape in the wrong order",
     "reshape rows to [heads, head_dim]"),
    ("embedding-rows-shifted", "model", "its rows are shifted by one", "a padding row at 0", "row t is token t"),
    ("nibbles-swapped", "layer", "MXFP4: the high nibble was read first", "other FP4 formats", "low nibble first"),
    ("scale-off-by-one", "layer", "MXFP4: scales are twice what they should be", "a bias of 126", "2^(scale - 127)"),
    ("scale-ignored", "layer", "MXFP4: scales were not applied", "codes looked up, nothing more", "multiply by 2^(scale - 127)"),
    ("scale-linear", "layer", "MXFP4: scales were read as numbers, are exponents", "a multiplication by the byte", "2^(scale - 127)"),
    ("scales-shifted", "layer", "MXFP4: each block has its neighbour's scale", "an offset into the scales", "one scale a block of 32"),
    ("sign-lost", "layer", "MXFP4: signs are lost", "a table of 8 codes", "bit 3 is the sign"),
    ("minus-zero-lost", "layer", "-0.0 became 0.0", "a cast, or arithmetic in place of a table", "harmless in use; a byte-exact copy keeps it"),
)  # fmt: skip

# Right in float32, by arithmetic that no test of behaviour can tell apart; each has its proof in tests/test_parity_faults.py.
EQUIVALENT: list[Fault] = [
    Fault("norm-cast-first", "attn_norm", "layer", "RMSNorm casts before it multiplies by its scale", "code of Llama",
          "multiply in float32, then cast", "in float32 there is no cast; in bfloat16 it is 1.36 times the reference's error, which the precision arm shows and lets pass"),
    Fault("router-softmax-renormalised", "expert_weights", "layer", "expert weights are a softmax over all experts, renormalised",
          "code of Mixtral", "nothing needs doing", "exp(a) / sum over the chosen of exp is the same quotient"),
    Fault("sinks-softmax-rescaled", "attn_core", "layer", "the sink is applied after a softmax without it, by rescaling",
          "fused attention with a log-sum-exp", "nothing needs doing", "softmax(a) · sigmoid(lse - sink) is the same quotient"),
    Fault("mask-finite", "attn_core", "layer", "masked logits are -1e9, should be -inf", "most code",
          "nothing needs doing", "exp(-1e9 - max) is 0 in float32"),
    Fault("norm-eps", "attn_norm", "layer", "consistent with an eps of 1e-6 in RMSNorm, should be {eps}", "the default of Llama",
          "take rms_norm_eps from the config", "4.5e-6 over the stream's mean square: below the gate from about 2 on; where it shows, it is named",
          wrong=wrong.setting(rms_norm_eps=1e-6)),
]  # fmt: skip

CATALOGUE: dict[str, Fault] = {fault.name: fault for fault in (*CODE, *MODEL, *CHECKPOINT, *EQUIVALENT)}


# When a mistake can be made at all, and makes a difference: of the settings of `parity.configs`. Else: always.
APPLIES: dict[str, Callable[[Settings], bool]] = {
    **dict.fromkeys(
        ("router-top-k-less", "router-uniform", "router-weights-reversed", "weights-averaged", "weights-ignored",
         "weights-before-experts", "down-bias-unweighted"), lambda s: s["num_experts_per_tok"] > 1,
    ),
    **dict.fromkeys(
        ("router-top-k-more", "router-lowest", "router-softmax-over-all"), lambda s: s["num_experts_per_tok"] < s["num_experts"]
    ),
    **dict.fromkeys(("experts-off-by-one", "experts-permuted"), lambda s: s["num_experts"] > 1),
    "window-one-short": lambda s: s["sliding_window"] > 1,
    "window-chunked": lambda s: s["sliding_window"] > 1,
    "attention-scale-hidden": lambda s: s["hidden_size"] != s["head_dim"],
    "window-half": lambda s: s["sliding_window"] > 3,  # otherwise it is the one before, or next to nothing
    **dict.fromkeys(
        ("kv-heads-tiled", "sinks-head-order", "qkv-split-by-group"),
        lambda s: 1 < s["num_key_value_heads"] < s["num_attention_heads"],
    ),
    **dict.fromkeys(("yarn-missing", "yarn-linear", "yarn-concentration-missing", "yarn-concentration-squared",
                     "yarn-concentration-not-on-k"),
                    lambda s: s["rope_factor"] > 1),
    "layers-exchanged": lambda s: s["num_hidden_layers"] > 1,
    "rope-half-of-head": lambda s: s["head_dim"] % 4 == 0,
    "yarn-truncated": lambda s: not s["rope_truncate"],
    "yarn-betas-exchanged": lambda s: s["rope_beta_fast"] != s["rope_beta_slow"],
    "yarn-original-length": lambda s: s["rope_original_max_position_embeddings"] != s["max_position_embeddings"],
    "rope-theta": lambda s: s["rope_theta"] != 1e4,
    "swiglu-alpha-one": lambda s: s["swiglu_alpha"] != 1,
    "swiglu-alpha-rounded": lambda s: s["swiglu_alpha"] == 1.702,
    "swiglu-limit-ten": lambda s: s["swiglu_limit"] != 10,
    "norm-eps": lambda s: s["rms_norm_eps"] == 1e-5,
}  # fmt: skip


def applies(fault: Fault, settings: Settings) -> bool:
    """To a model with these settings; with none, nobody knows."""
    return not settings or APPLIES.get(fault.name, lambda settings: True)(settings)


def at(tap: str, settings: Settings) -> list[Fault]:
    """The mistakes that show first at a tap of a model with these settings, if they show."""
    return [fault for fault in CATALOGUE.values() if fault.tap == tap and fault.wrong is not None and applies(fault, settings)]


FILLED = {"alpha": "swiglu_alpha", "limit": "swiglu_limit", "theta": "rope_theta", "eps": "rms_norm_eps"}


def sentence(fault: Fault, window: int, settings: Settings) -> str:
    """`says` with the reference's numbers; the name of the setting where they are not known."""
    numbers = {key: settings.get(name, name) for key, name in FILLED.items()}
    return fault.says.format(window=window, longer=window + 1, shorter=window - 1, half=window // 2, **numbers)
