"""The reference's gradients: transformers' whole model, differentiated by PyTorch. See `parity.gradients`."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from parity import metrics
from parity.nudging import DRAWS
from parity.protocols import Arrays
from parity.reference.layer import to_numpy, watch_router

if TYPE_CHECKING:
    from parity.reference.checkpoint import Reference


_AGAIN = {
    "block": lambda layer, args, kwargs, out: layer.forward(out, *args[1:], **kwargs),
    "experts": lambda layer, args, kwargs, out: out + layer.mlp(layer.post_attention_layernorm(out))[0],
}


def gradients(
    reference: "Reference", tokens: np.ndarray, twice: str = "", nudged: "Nudged | None" = None
) -> tuple[Arrays, list[np.ndarray]]:
    """PyTorch's gradients, named and laid out as in Orbax, and each layer's choice of experts.

    Args:
      tokens: int [batch, length], without padding.
      twice: "block" or "experts": what is applied a second time in every layer, to name a model that does so.
      nudged: as that one, where rounding has moved what each layer is given.
    """
    from parity.reference.checkpoint import as_in_orbax
    from parity.reference.whole import whole_model

    model = whole_model(reference)
    model.model.embed_tokens.padding_idx = None  # torch would leave out the padding token's embedding
    model.requires_grad_(True)
    routing: list[np.ndarray] = []
    layers: Any = model.model.layers
    for n, layer in enumerate(layers):
        layer.mlp.router.register_forward_hook(lambda module, args, output: routing.append(output[2].numpy()))
        if nudged is not None:
            layer.register_forward_pre_hook(nudged.hook)
            layer.mlp.router.register_forward_hook(watch_router({}, {"expert_choice": torch.from_numpy(nudged.routing[n])}))
        if twice:
            layer.register_forward_hook(_AGAIN[twice], with_kwargs=True)
    given = torch.from_numpy(tokens).long()
    logits = model(given, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {
        "embedding.weight": to_numpy(grads["model.embed_tokens.weight"]),
        "norm.scale": to_numpy(grads["model.norm.weight"]),
        "lm_head.weight": to_numpy(grads["lm_head.weight"]),
    }
    for n in range(reference.sizes.layers):
        prefix = f"model.layers.{n}."
        layer = {name.removeprefix(prefix): grad for name, grad in grads.items() if name.startswith(prefix)}
        found |= {name: to_numpy(grad) for name, grad in as_in_orbax(reference.config, n, layer)}
    return found, routing


class Nudged:
    """What each layer is given, off by what float32 rounds; its tokens go to the experts of `routing`."""

    def __init__(self, draw: int, routing: list[np.ndarray]):
        self.generator, self.routing = torch.Generator().manual_seed(draw), routing

    def hook(self, module: torch.nn.Module, args: tuple) -> tuple:
        off = metrics.FLOOR * torch.randn(args[0].shape, generator=self.generator)
        return args[0] * (1 + off), *args[1:]


def moved(reference: "Reference", tokens: np.ndarray) -> dict[str, float]:
    """How far rounding alone moves each gradient, relative L2: the largest of some draws, as `parity.nudging`."""
    want, routing = gradients(reference, tokens)
    draws = [gradients(reference, tokens, nudged=Nudged(draw, routing))[0] for draw in range(DRAWS)]
    return {name: max(min(metrics.rel_l2(got[name], want[name]), metrics.WORST) for got in draws) for name in want}
