"""Mistakes of how the model is run, as wrong walks and wrong caches, and by where else it is right.

A form (`parity.forms`) that goes wrong was watched: everything that it computed before it went wrong is right. From that each
function makes what the next value would be with a mistake. Where nothing can be made, since it may be wrong in any way, what
is right in other forms is a sign. The table is `parity.mistakes.run_catalogue`; nothing here is how `parity.injection.runs`
makes the mistakes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from oss_model.taps import LAYER_TAPS
from parity import equations as eq
from parity.mistakes.wrong_equations import Wrong
from parity.protocols import CALL, Answers, Arrays, Settings, Wrongly, padding_of

Place = tuple[int | None, str]
Numbers = dict[str, Any]
_HEADS = ("q", "k", "v", "q_rope", "k_rope", "attn_core")
_ROUTER = ("router_logits", "expert_choice", "expert_weights")
TOKENS, UPDATED = "tokens", "updated logits"  # places of forms that give no logits of their own
BLOCKWISE = ("attention in blocks", "cache, in blocks")
PATHS = ("loop", "scan", "grouped", "pairs", "ragged")


@dataclasses.dataclass
class Evidence:
    """Of a form that is wrong.

    Attributes:
      tap: where it first parts from the reference, in `layer`; RETURNED; or what it gives, where that is all there is.
      got: what the form computed, of row and position; where it gives no logits, under `place` what it gave.
      wrong: of each row, whether it is wrong there.
      right: the right parameters of a layer, or of what lies outside them.
      right_in: whether the same value is right in another form; None if nobody can say.
      settings: the reference's.
    """

    form: str
    layer: int | None
    tap: str
    got: dict[Place, Any]
    answers: Answers
    wrong: list[bool]
    settings: Settings
    oracle: Wrongly
    right: Callable[[int | None], eq.Values]
    right_in: Callable[[str], bool | None]

    @property
    def place(self) -> Place:
        return self.layer, self.tap

    @property
    def rows(self) -> range:
        return range(len(self.answers.rows))

    @property
    def longest(self) -> int:
        return max(map(len, self.answers.rows))

    @property
    def window(self) -> int | None:
        return None if self.layer is None else eq.of_layer(self.settings, self.layer)["window"]

    def padding(self, row: int) -> int:
        return self.longest - len(self.answers.rows[row])

    def stream(self, layer: int | None, row: int) -> np.ndarray:
        """What comes into a layer, [length, hidden]; None: into the last norm."""
        return self.got[self._before(layer)][row]

    def _before(self, layer: int | None) -> Place:
        before = (self.settings["num_hidden_layers"] if layer is None else layer) - 1
        return (None, "embedding") if before < 0 else (before, "layer_out")

    def shaped(self, tap: str, value: np.ndarray) -> np.ndarray:
        """As equations take it."""
        if tap in _ROUTER:
            return value
        return value.reshape(1, len(value), -1, self.settings["head_dim"]) if tap in _HEADS else value[None]

    def given(self, row: int, layer: int | None) -> dict[str, np.ndarray]:
        """Of a row, what the form computed in a layer, and where."""
        places = [place for place in self.got if place[0] == layer and place[1] in (*LAYER_TAPS, "final_norm")]
        found = {tap: self.shaped(tap, self.got[layer, tap][row]) for layer, tap in places}
        if self._before(layer) in self.got:
            found["x"] = self.stream(layer, row)[None]
        return {**found, "positions": np.arange(len(self.answers.rows[row]))[None]}

    def computed(
        self, row: int, place: Place | None = None, wrong: Wrong | None = None, of: int | None = None, dtype: Any = np.float64,
        **changed: Any,
    ) -> np.ndarray:  # fmt: skip
        """A tap [length, ...] from what the form itself computed before it.

        Args:
          wrong: with this mistake.
          of: with the parameters and the window of this layer in place of its own.
          changed: taps that are others than the form's, as equations take them.
        """
        layer, tap = place or self.place
        owner = layer if of is None else of
        settings = self.settings if owner is None else eq.of_layer(self.settings, owner)
        compute = wrong.tap if wrong is not None else eq.tap if dtype == np.float64 else eq.noise
        return compute(tap, self.given(row, layer) | changed, self.right(owner), settings).reshape(
            len(self.answers.rows[row]), -1
        )


class Made(NamedTuple):
    """What a mistake would have given.

    Attributes:
      rows: [length, ...] each; tokens; or by name.
      numbers: for the sentence.
      place: where, if it is not where the form parts.
      of: of which tokens of each row it says something.
    """

    rows: list[np.ndarray] | Arrays
    numbers: Mapping[str, Any] = MappingProxyType({})
    place: Place | None = None
    of: slice = slice(None)


# --- how the model is put together ------------------------------------------------------------------------------


def not_run(e: Evidence) -> Iterator[Made]:
    """The layer has no taps, and the next one goes on from the layer before it."""
    if e.layer is not None and not any((e.layer, tap) in e.got for tap in LAYER_TAPS):
        last = e.layer + 1 == e.settings["num_hidden_layers"]
        place = (None, "final_norm") if last else (e.layer + 1, "attn_norm")
        rows = [e.computed(row, place, x=e.stream(e.layer, row)[None]) for row in e.rows]
        yield Made(rows, {"layer": e.layer}, place)


def of_another_layer(e: Evidence) -> Iterator[Made]:
    for other in range(e.settings["num_hidden_layers"]):
        if e.layer is not None and other != e.layer and e.place in e.got:
            yield Made([e.computed(row, of=other) for row in e.rows], {"layer": e.layer, "other": other})


def scaled(e: Evidence) -> Iterator[Made]:
    """A norm takes no notice, so it shows where the stream is added to. What came in is what is left of what goes out."""
    parts = [(e.layer, tap) for tap in ("attn_out", "mlp_out", "layer_out")]
    if e.layer is None or not all(part in e.got for part in parts):
        return
    added = [e.got[parts[0]][row] + e.got[parts[1]][row] for row in e.rows]
    right, came = (np.concatenate(rows).astype(np.float64).reshape(-1) for rows in (
        [e.stream(e.layer, row) for row in e.rows], [e.got[parts[2]][row] - added[row] for row in e.rows]))  # fmt: skip
    times = float(right @ came / max(right @ right, 1e-300))
    where = "the embedding" if e.layer == 0 else f"what layer {e.layer - 1} gives"
    rows = [times * e.stream(e.layer, row).astype(np.float64) + added[row] for row in e.rows]
    yield Made(rows, {"times": f"{times:.4g}", "what": where, "layer": e.layer}, parts[2])


def of_a_neighbour(e: Evidence) -> Iterator[Made]:
    for shift, of in ((1, slice(1, None)), (-1, slice(None, -1))):
        rows = [np.roll(e.got[None, "logits"][row], shift, axis=0) for row in e.rows]
        yield Made(rows, {"which": "before" if shift > 0 else "after"}, None, of)


# --- rows and padding -------------------------------------------------------------------------------------------


def first_rows(e: Evidence) -> Iterator[Made]:
    """Other rows see keys of the first, values, or both, of the same column: their padding is on the left, or the right."""
    for left, taps in itertools.product((True, False), (("k_rope",), ("v",), ("k_rope", "v"))):
        rows = []
        for row in e.rows:
            start, length = e.padding(row) if left else 0, len(e.answers.rows[row])
            of_first: dict[str, Any] = {tap: e.shaped(tap, e.got[e.layer, tap][0][start : start + length]) for tap in taps}
            rows.append(e.computed(row, **of_first))
        yield Made(rows, {"what": " and ".join({"k_rope": "keys", "v": "values"}[tap] for tap in taps)})


def rotated(e: Evidence, places: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """q or k, rotated as if each token of a row lay at `places`."""
    return [e.computed(row, positions=places(row)[None]) for row in e.rows]


def other_rows_rotated(e: Evidence) -> Iterator[Made]:
    for more in (1, -1, *({e.padding(row) for row in e.rows} - {0, 1})):
        yield Made(rotated(e, lambda row, more=more: np.arange(len(e.answers.rows[row])) + more * (row > 0)), {"more": more})


def padding_seen(e: Evidence) -> Iterator[Made]:
    """Keys of padding are what the form computed of them; who sees them is one of a few."""
    keys = [(e.layer, padding_of(tap)) for tap in ("k_rope", "v")]
    if not all(key in e.got for key in keys) or not sum(len(rows) for rows in e.got[keys[0]]):
        return
    for sees in (
        lambda t, column, pad: 0 <= t - 1 < (e.window or np.inf),  # -1 taken for 1
        lambda t, column, pad: t < (e.window or np.inf),  # or for 0
        lambda t, column, pad: True,
        lambda t, column, pad: t + pad - column < (e.window or np.inf),
    ):
        rows = []
        for row in e.rows:
            taps, pad = e.given(row, e.layer), len(e.got[keys[0]][row])
            behind = taps["positions"][0][:, None] - np.concatenate([np.arange(pad), taps["positions"][0]])[None]
            seen = (behind >= 0) & (behind < (e.window or np.inf))
            for column in range(pad):
                seen[:, column] = [sees(t, column, pad) for t in taps["positions"][0]]
            k, v = (
                np.concatenate([e.shaped(tap, e.got[key][row]) if pad else taps[tap][:, :0], taps[tap]], axis=1)
                for tap, key in zip(("k_rope", "v"), keys, strict=True)
            )
            rows.append(_attended(e, taps["q_rope"], k, v, seen))
        yield Made(rows)


def nan_from_padding(e: Evidence) -> Numbers | None:
    """Rows without padding are right, of the others nothing is a number, and before it that was so of padding alone."""
    padded = [e.padding(row) > 0 for row in e.rows]
    before = [
        place for place in e.got if place[1].endswith(padding_of("")) and place[0] is not None and place[0] < (e.layer or 0)
    ]
    nan = [place for place in before if any(not np.isfinite(rows).all() for rows in e.got[place])]
    if e.wrong != padded or not nan or any(np.isfinite(e.got[e.place][row]).any() for row in e.rows if padded[row]):
        return None
    layer, tap = min(nan, key=lambda place: (place[0], _order(place[1])))
    return {"layer": layer, "tap": tap.removesuffix(padding_of(""))}


def _order(tap: str) -> int:
    return LAYER_TAPS.index(tap.removesuffix(padding_of("")))


def _attended(e: Evidence, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    with np.errstate(all="ignore"):
        core = eq.attend(q, k, v, e.right(e.layer)["attn.sinks"], seen[None], e.settings["head_dim"] ** -0.5)
    return core.reshape(q.shape[1], -1)


# --- the cache --------------------------------------------------------------------------------------------------


class Ring:
    """One row's cache in one layer: of each slot the position it holds, and of which tokens the key and the value are."""

    def __init__(self, e: Evidence):
        self.window, self.size = e.window, min(e.longest, e.window or e.longest)
        self.slots = np.full((3, self.slots_of(self.size)), -1)  # positions, keys, values

    def slots_of(self, size: int) -> int:
        return size

    def kept(self, new: np.ndarray) -> np.ndarray:
        return new[-self.slots.shape[1] :]

    def store(self, new: np.ndarray, width: int) -> None:
        """New tokens, of a call that is so wide: with its padding."""
        self.slots[:, self.kept(new) % self.slots.shape[1]] = self.kept(new)

    def looked_at(self, new: np.ndarray, width: int) -> np.ndarray:
        """[3, keys]: the cache and what is new; one token is stored first."""
        return self.slots if width == 1 else np.concatenate([self.slots, np.broadcast_to(new, (3, len(new)))], axis=1)

    def sees(self, behind: np.ndarray) -> np.ndarray:
        return (behind >= 0) & (behind < (self.window or np.inf))


class ValuesOff(Ring):
    def store(self, new: np.ndarray, width: int) -> None:
        super().store(new, width)
        if width > 1:
            self.slots[2] = np.roll(self.slots[2], 1)


class KeepsTheFirst(Ring):
    def kept(self, new: np.ndarray) -> np.ndarray:
        return new[: self.slots.shape[1]]


class NothingOfAPrefill(Ring):
    def store(self, new: np.ndarray, width: int) -> None:
        held = self.slots[1:].copy()
        super().store(new, width)
        if width > 1:
            self.slots[1:] = held


class Alone(Ring):
    def looked_at(self, new: np.ndarray, width: int) -> np.ndarray:
        return self.slots if width == 1 else np.broadcast_to(new, (3, len(new)))


class OneShort(Ring):
    def slots_of(self, size: int) -> int:
        return max(size - 1, 1)


def on_the_cache(kind: Callable[[Evidence], Ring], **numbers: Any) -> Callable[[Evidence], Iterator[Made]]:
    def made(e: Evidence) -> Iterator[Made]:
        if (None, CALL) in e.got and any(calls.max() > 0 for calls in e.got[None, CALL]):
            yield Made([_through(e, row, kind(e)) for row in e.rows], numbers)

    return made


def _through(e: Evidence, row: int, ring: Ring) -> np.ndarray:
    """Attention of a row, call by call, on this cache."""
    taps, out = e.given(row, e.layer), []
    blank = {tap: np.concatenate([taps[tap][0], np.zeros_like(taps[tap][0][:1])])[None] for tap in ("k_rope", "v")}
    for call in range(1 + int(max(calls.max() for calls in e.got[None, CALL]))):
        new = np.flatnonzero(e.got[None, CALL][row] == call)
        width = max(int((calls == call).sum()) for calls in e.got[None, CALL])
        if width == 1 and new.size:
            ring.store(new, width)
        positions, keys, values = ring.looked_at(new, width)
        if new.size:
            seen = ring.sees(new[:, None] - positions[None]) & (positions >= 0)[None]
            out.append(_attended(e, taps["q_rope"][:, new], blank["k_rope"][:, keys], blank["v"][:, values], seen))
        if width > 1 and new.size:
            ring.store(new, width)
    return np.concatenate(out)


def lost_past(e: Evidence) -> Iterator[Made]:
    """The first token that is wrong is the first that sees as far as that."""
    if (None, CALL) not in e.got:
        return
    for far in {first for row in e.rows if e.wrong[row] for first in _first_wrong(e, row)}:

        class Forgets(Ring):
            def sees(self, behind: np.ndarray, far: int = far) -> np.ndarray:
                return super().sees(behind) & (behind < far)

        if far > 0:
            yield from on_the_cache(Forgets, far=far)(e)


def _first_wrong(e: Evidence, row: int) -> list[int]:
    """By the equation."""
    right, got = e.computed(row), e.got[e.place][row]
    apart = np.linalg.norm(got - right, axis=-1) > 1e-4 * np.linalg.norm(right, axis=-1)
    return [int(np.flatnonzero(apart)[0])] if apart.any() else []


def next_places(after: Callable[[Evidence, int, int, int], int]) -> Callable[[Evidence], Iterator[Made]]:
    """The last tokens of each row, as many as are wrong in one, are placed at `after(evidence, row, first, since)`."""

    def made(e: Evidence) -> Iterator[Made]:
        if (None, CALL) not in e.got:
            return
        lengths = [len(row) for row in e.answers.rows]
        steps = max((lengths[row] - first for row in e.rows for first in _first_wrong(e, row)), default=0)

        def places(row: int) -> np.ndarray:
            start = lengths[row] - steps
            return np.array([t if t < start else after(e, row, start, t - start) for t in range(lengths[row])])

        yield Made(rotated(e, places))

    return made


# --- generating, training, adapting -----------------------------------------------------------------------------


def the_worst(e: Evidence) -> Iterator[Made]:
    """Of the reference's logits after each token that was made."""
    rows = [np.concatenate([row, made[:-1]]) for row, made in zip(e.answers.rows, e.got[e.place], strict=True)]
    *_, last = e.oracle.taps(None, rows)
    logits = [out[len(row) - 1 :] for out, row in zip(last[None, "logits"], e.answers.rows, strict=True)]
    yield Made([one.argmin(-1) for one in logits])


def goes_on(e: Evidence) -> Iterator[Made]:
    rows = [made[: len(got)] for made, got in zip(e.answers.made, e.got[e.place], strict=True)]
    if e.form.endswith("eos") and all(len(row) == len(got) for row, got in zip(rows, e.got[e.place], strict=True)):
        yield Made(rows)


def rescaled(e: Evidence) -> Iterator[Made]:
    """Updates of another scale than alpha / rank."""
    updates, alpha = e.got[None, "updates"]
    rank = next(iter(updates.values()))[1].shape[-1]
    for says, other in (("not at all", float(rank)), ("by alpha", alpha * rank), ("by alpha / sqrt(rank)", alpha * rank**0.5)):
        if other != alpha and (rows := e.oracle.updated(e.answers.rows, updates, other)) is not None:
            yield Made(rows, {"how": says})


def not_applied(e: Evidence) -> Iterator[Made]:
    yield Made(e.answers.logits)


def twice(part: str) -> Callable[[Evidence], Iterator[Made]]:
    def made(e: Evidence) -> Iterator[Made]:
        yield Made(e.oracle.twice(part, e.answers.rows[0]))

    return made


# --- where it is right ------------------------------------------------------------------------------------------


def compiled_alone(e: Evidence) -> Numbers | None:
    """Right op by op, and wrong in the plainest compiled form, on every path of the experts."""
    others = [f"path {path}" for path in PATHS[1:]] if e.tap == "mlp_out" else []
    return (
        {} if e.right_in("jit") is False and e.right_in("eager") and all(e.right_in(one) is False for one in others) else None
    )


def one_path(e: Evidence) -> Numbers | None:
    if e.form.startswith("mesh"):
        return None
    right = {path: e.right_in(f"path {path}") for path in PATHS}
    wrong = [path for path, found in right.items() if found is False]
    own = e.form.removeprefix("path ") in wrong or not e.form.startswith("path ")
    return {"paths": ", ".join(wrong)} if wrong and own and any(right.values()) else None


def here_alone(forms: Callable[[str], bool], *others: str) -> Callable[[Evidence], Numbers | None]:
    """Of these forms, where the same value is right in all of the others."""
    return lambda e: {"form": e.form} if forms(e.form) and all(e.right_in(other) for other in others) else None
