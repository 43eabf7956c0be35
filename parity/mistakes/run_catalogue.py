"""Known mistakes of how the model is put together, cached, compiled and trained: how each is told, and recognised.

A row is named where what it makes is what the form gave, or where its sign leaves no other (`parity.mistakes.wrong_runs`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from oss_model.taps import LAYER_TAPS
from parity.mistakes import wrong_runs as runs
from parity.mistakes.wrong_runs import TOKENS, UPDATED, Evidence, Made, Numbers
from parity.protocols import RETURNED


class RunFault(NamedTuple):
    """A known mistake of how the model is run.

    Attributes:
      at: where it may show: taps, RETURNED, or what a form gives.
      says, seen, fix: as `parity.mistakes.catalogue.Fault`.
      made: what it would have given, one for each way to make it.
      signs: what tells it from all others where nothing can be made; None if it is not this one.
    """

    name: str
    at: tuple[str, ...]
    says: str
    seen: str
    fix: str
    made: Callable[[Evidence], Iterator[Made]] = lambda e: iter(())
    signs: Callable[[Evidence], Numbers | None] = lambda e: None


_NORMS = ("attn_norm", "q", "k", "v", "attn_core", "attn_out", "mlp_norm", "router_logits", "mlp_out")
_ROTATED = ("q_rope", "k_rope")

LOADING = RunFault("lost-in-loading", (), "{name} is lost in loading: {note}", "a parameter that is skipped, or made anew afterwards",
                "what is stored is right: look at how it is loaded")  # fmt: skip
RUN_CATALOGUE: tuple[RunFault, ...] = (
    LOADING,
    RunFault("layer-not-run", ("attn_norm",), "layer {layer} is not run", "a loop that ends one too early", "run every layer",
          made=runs.not_run),
    RunFault("layers-in-another-order", _NORMS, "layer {layer} is run with the parameters of layer {other}",
          "layers sorted by name: 10 before 2", "run layers in the order of their numbers", made=runs.of_another_layer),
    RunFault("stream-scaled", ("mlp_norm", "layer_out"), "{what} is multiplied by {times} before layer {layer}",
          "code of Gemma, which scales the embedding", "hand it on as it is", made=runs.scaled),
    RunFault("logits-of-a-neighbour", (RETURNED,), "the logits are those of the token {which}",
          "logits shifted for a loss, and returned so", "logits at a place are of the token that follows it", made=runs.of_a_neighbour),
    RunFault("rows-see-the-first", ("attn_core",), "other rows see the {what} of the first row", "a batch axis that is broadcast",
          "each row has keys and values of its own", made=runs.first_rows),
    RunFault("rows-rotated-apart", _ROTATED, "rows after the first are rotated {more} places more than they should be",
          "one table of positions for all rows", "rotate by each row's own positions", made=runs.other_rows_rotated),
    RunFault("padding-seen", ("attn_core",), "queries see padding", "a mask of the order alone", "mask keys that are padding",
          made=runs.padding_seen),
    RunFault("padding-is-nan", LAYER_TAPS, "padding is no number from layer {layer} {tap} on, and reaches the tokens of its row",
          "a softmax over nothing", "a query that sees nothing gives zero", signs=runs.nan_from_padding),
    RunFault("values-a-slot-off", ("attn_core",), "values lie a slot off their keys in the cache",
          "two indices that are counted apart", "store a key and its value in one slot", made=runs.on_the_cache(runs.ValuesOff)),
    RunFault("ring-keeps-the-first", ("attn_core",), "a prompt longer than the ring leaves its first keys there, should be its last",
          "a slice from the wrong end", "keep the last ones", made=runs.on_the_cache(runs.KeepsTheFirst)),
    RunFault("prefill-not-stored", ("attn_core",), "a prefill leaves no keys and values in the cache", "an update that is not returned",
          "go on with the cache that comes back", made=runs.on_the_cache(runs.NothingOfAPrefill)),
    RunFault("pieces-do-not-see-the-cache", ("attn_core",), "a later piece of a prompt does not see the cache",
          "a prefill that takes every prompt for the first", "look at the cache and what is new", made=runs.on_the_cache(runs.Alone)),
    RunFault("ring-one-slot-short", ("attn_core",), "the ring has a slot less than the window", "window - 1 keys and the query itself",
          "as many slots as the window, since a token is stored before it looks", made=runs.on_the_cache(runs.OneShort)),
    RunFault("keys-lost", ("attn_core",), "on the cache keys {far} places back and more are lost", "a cache that is too short",
          "room for every position", made=runs.lost_past),
    RunFault("next-position-one-too-many", _ROTATED, "each token on the cache is placed one after where it should be",
          "counting from 1", "the next position is that of the last token plus 1",
          made=runs.next_places(lambda e, row, start, since: -1 if start + 2 * since + 1 >= e.longest else start + 2 * since + 1)),
    RunFault("padding-counted", _ROTATED, "tokens on the cache are placed after the padding of their row, as if it were tokens",
          "the width of the batch taken for the length of a row", "count the tokens of each row",
          made=runs.next_places(lambda e, row, start, since: start + since + e.padding(row))),
    RunFault("padding-stored", _ROTATED, "padding is stored like tokens: in rows that have some the cache is taken to be full",
          "an index of -1, which is the last slot", "do not store padding",
          made=runs.next_places(lambda e, row, start, since: -1 if e.padding(row) else start + since)),
    RunFault("generate-takes-the-worst", (TOKENS,), "the least likely token is taken", "an ascending sort", "take the highest logit",
          made=runs.the_worst),
    RunFault("generate-ignores-eos", (TOKENS,), "a text goes on after the token that ends it", "an end that is compared with nothing",
          "stop after any of the tokens that end a text", made=runs.goes_on),
    RunFault("lora-scale", (UPDATED,), "updates are scaled {how}, should be by alpha / rank", "the scale left to the caller",
          "multiply B·A by alpha / rank", made=runs.rescaled),
    RunFault("lora-not-applied", (UPDATED,), "updates are not applied", "a map that is not adapted", "add them to every map",
          made=runs.not_applied),
    RunFault("lora-merged-otherwise", (UPDATED,), "what is merged is not what is computed beside the weights, which is right",
          "the scale applied twice, or to one of the two", "add alpha / rank · B·A to the weights",
          signs=runs.here_alone(lambda form: form == "lora merged", "lora")),
    RunFault("block-applied-twice", ("gradients",), "gradients are those of a model that applies every block twice",
          "the recomputation feeds itself", "compute a block once more from its own input", made=runs.twice("block")),
    RunFault("experts-applied-twice", ("gradients",), "gradients are those of a model that applies the experts of every block twice",
          "the recomputation feeds itself", "compute them once more from their own input", made=runs.twice("experts")),
    RunFault("wrong-when-compiled", LAYER_TAPS, "it is right computed op by op, and wrong where it is compiled",
          "a branch on whether a value is traced, or a bug of the compiler", "compare eager and jit of this part",
          signs=runs.compiled_alone),
    RunFault("wrong-on-a-path", ("mlp_out",), "the experts' sum is right on other paths, and wrong on: {paths}",
          "one way to compute it", "compare expert_path of this name with another", signs=runs.one_path),
    RunFault("wrong-in-blocks", ("attn_core",), "attention is right dense, and wrong computed in blocks", "the running maximum, or the sum",
          "compare attention_block=0", signs=runs.here_alone(runs.BLOCKWISE.__contains__, "jit")),
    RunFault("wrong-when-scanned", LAYER_TAPS, "it is right layer by layer, and wrong where layers are one loop",
          "parameters stacked in another order", "compare with oss_model.scanned.unscanned",
          signs=runs.here_alone("scanned".__eq__, "jit")),
    RunFault("wrong-on-a-mesh", LAYER_TAPS, "it is right on one device, and wrong on this mesh ({form})", "a sum over the wrong axis",
          "compare with one device", signs=runs.here_alone(lambda form: form.startswith("mesh"), "jit")),
    RunFault("wrong-when-packed", ("mlp_out",), "the experts' sum is right of values, and wrong of packed experts",
          "how a block is decoded", "compare with the decoded values", signs=runs.here_alone("packed".__eq__, "values", "eager")),
)  # fmt: skip
