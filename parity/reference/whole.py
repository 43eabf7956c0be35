"""transformers' whole model, in memory: logits, gradients, what it generates, and with an update made by peft."""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from parity.nudging import moved
from parity.protocols import Answers, Arrays, Question, Updates
from parity.reference.layer import to_numpy

if TYPE_CHECKING:
    from parity.reference.checkpoint import Reference


def whole_model(reference: "Reference", dtype: torch.dtype = torch.float32) -> gpt_oss.GptOssForCausalLM:
    """With parameters of its own, so that changing them changes no other."""
    with torch.device("meta"):
        model = gpt_oss.GptOssForCausalLM(reference.config)
    state = reference.outer_state()
    for n in range(reference.sizes.layers):
        state |= {f"model.layers.{n}.{name}": t for name, t in reference.layer(n).decoded.items()}
    copies = {name: t.to(dtype).clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    model.load_state_dict(copies, assign=True)
    model.model.rotary_emb = reference.rotary
    return model.eval()


class Whole:
    """A reference that fits in memory, and what it is asked for run forms."""

    def __init__(self, reference: "Reference"):
        self.reference, self.model = reference, whole_model(reference)

    @torch.no_grad()
    def logits(self, rows: Sequence[np.ndarray], dtype: str = "float32") -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each row, run alone: logits [length, vocab], and the margin of its routing [length].

        A margin is the least, over the layers, between the last expert that was chosen and the first that was not, over the
        largest logit of that token and layer.
        """
        model = self.model if dtype == "float32" else whole_model(self.reference, getattr(torch, dtype))
        found, margins = [], []
        for row in rows:
            with _routers(model) as routed:
                found.append(to_numpy(model(_one(row), use_cache=False).logits[0].float()))
            margins.append(np.min([_margin(logits, self.reference.config.num_experts_per_tok) for logits in routed], axis=0))
        return found, margins

    @torch.no_grad()
    def generate(self, rows: Sequence[np.ndarray], count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """What follows each row, greedily and alone: `count` tokens, by how much each was the likeliest, and the next one.

        That margin is over the largest logit.
        """
        how = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        made, margins, seconds = [], [], []
        self.model.generation_config.eos_token_id = None  # else it takes the place of None above
        for row in rows:
            given = _one(row)
            out: Any = self.model.generate(  # type: ignore[operator]
                given,
                attention_mask=torch.ones_like(given),
                generation_config=how,
            )
            made.append(out.sequences[0, len(row) :].numpy())
            best, tokens = torch.stack([logits[0].float() for logits in out.logits]).topk(2)
            largest = torch.stack([logits[0].float().abs().max() for logits in out.logits])
            margins.append(((best[:, 0] - best[:, 1]) / largest).numpy())
            seconds.append(tokens[:, 1].numpy())
        return made, margins, seconds

    @torch.no_grad()
    def updated(self, rows: Sequence[np.ndarray], updates: Updates, alpha: float) -> list[np.ndarray] | None:
        """Logits of each row with low-rank updates of these modules, made by peft; None where it is not installed."""
        if importlib.util.find_spec("peft") is None:
            return None
        from peft import LoraConfig, get_peft_model

        rank = next(b.shape[-1] for _, b in updates.values())
        names = {_theirs(name) for name in updates}
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=sorted({name.rsplit(".", 1)[-1] for name in names if ".experts." not in name}),
            target_parameters=sorted({".".join(name.rsplit(".", 3)[-3:]) for name in names if ".experts." in name}),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.24 for what it has renamed
            adapted: Any = get_peft_model(whole_model(self.reference), config)  # type: ignore[arg-type]
        wanted = {}
        for name, (a, b) in updates.items():
            for key, value in _as_peft(_theirs(name), a, b).items():
                wanted[f"base_model.model.{key}"] = torch.from_numpy(np.ascontiguousarray(value))
        missing = wanted.keys() - adapted.state_dict().keys()
        assert not missing, f"peft has no parameters {sorted(missing)[:3]}"
        adapted.load_state_dict(wanted, strict=False)
        return [to_numpy(adapted(input_ids=_one(row), use_cache=False).logits[0]) for row in rows]

    def answer(self, question: Question) -> Answers:
        """As `parity.protocols.Oracle.answers`, of this model."""
        vocab = self.reference.sizes.vocab
        tried: list[Answers] = []
        for seed in question.seeds:
            rng = np.random.default_rng(seed)
            rows = [rng.integers(0, vocab, length) for length in question.lengths]
            tried.append(self._judgeable(rows))
            if np.concatenate(tried[-1].judged).all():  # else a tie is near whatever rounding does
                tried[-1] = self._nudged(tried[-1])
                if np.concatenate(tried[-1].judged).all():
                    break
        found = max(tried, key=lambda one: np.concatenate(one.judged).sum())
        found = found if found.moved is not None else self._nudged(found)
        made, made_margins, seconds = self.generate(found.rows, question.new) if "tokens" in question.kinds else ([], [], [])
        return found._replace(
            logits16=self.logits(found.rows, "bfloat16")[0] if "logits" in question.kinds else None,
            made=made,
            made_margins=made_margins,
            made_seconds=seconds,
            eos=(int(made[0][len(made[0]) // 3]),) if made else (),
            updated=self.updated(found.rows, *question.updates) if question.updates is not None else None,
            gradients=self.reference.gradients(found.rows[0][None])[0] if "gradients" in question.kinds else None,
        )

    def _judgeable(self, rows: list[np.ndarray]) -> Answers:
        """Of these rows, what decides which tokens can be judged."""
        logits, margins = self.logits(rows)
        return Answers(rows, margins, logits, None, made=[], made_margins=[], eos=(), updated=None, gradients=None)

    def _nudged(self, answers: Answers) -> Answers:
        found = moved(self.reference, [row[None] for row in answers.rows])
        return answers._replace(
            moved=[one.logits[0] / np.abs(right).max() for one, right in zip(found, answers.logits, strict=True)],
            moved_margins=[(one.routing / one.largest).max(0) for one in found],
            moved_taps=[one.taps for one in found],
        )


def _one(row: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(row, np.int64))[None]


@contextmanager
def _routers(model: gpt_oss.GptOssForCausalLM) -> Iterator[list[torch.Tensor]]:
    """The router logits of each layer, of what is run meanwhile."""
    seen: list[torch.Tensor] = []
    layers: Any = model.model.layers
    hooks = [layer.mlp.router.register_forward_hook(lambda module, args, out: seen.append(out[0])) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _margin(logits: torch.Tensor, k: int) -> np.ndarray:
    values = logits.float()
    if k >= values.shape[-1]:
        return np.full(len(values), np.inf)
    best = values.topk(k + 1).values
    return ((best[:, k - 1] - best[:, k]) / values.abs().amax(-1)).numpy()


# --- peft -------------------------------------------------------------------------------------------------------


def _theirs(name: str) -> str:
    """A module of ours by transformers' name: experts' maps are parameters there."""
    _, n, part, leaf = name.split(".")
    if part == "attn":
        return f"model.layers.{n}.self_attn.{leaf}"
    return f"model.layers.{n}.mlp.experts.{leaf}_proj"


def _as_peft(name: str, a: np.ndarray, b: np.ndarray) -> Arrays:
    """A and B of ours as peft has them. Wrappers of two parameters of a module nest: the first is inside, as `base_layer`."""
    if ".experts." not in name:
        rank = len(a)
        return {f"{name}.lora_A.default.weight": a.reshape(rank, -1), f"{name}.lora_B.default.weight": b.reshape(-1, rank)}
    experts, rank, inputs = a.shape
    if name.endswith("gate_up_proj"):  # gate and up come in turn
        b = b.swapaxes(1, 2)
    b = b.reshape(experts, -1, rank)
    inner = ".base_layer" if name.endswith("gate_up_proj") else ""
    prefix = name.rsplit(".", 1)[0] + inner
    return {
        f"{prefix}.lora_A.default.weight": a.reshape(experts * rank, inputs),
        f"{prefix}.lora_B.default.weight": b.transpose(1, 2, 0).reshape(b.shape[1], rank * experts),
    }
