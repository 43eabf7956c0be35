"""What the reference said, written down once, to be compared with later on a machine without PyTorch.

A recording is a directory of safetensors files (the prompt, the RoPE tables, the embedding, one a layer, the logits)
and a `manifest.json`, written last, that says of which source, sizes, dtype and versions, with a hash a parameter. It
stands in for `parity.reference` in the weights, semantics and free-run arms; the precision arm needs PyTorch itself.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file

from oss_model.errors import InputError
from oss_model.files import parse_json
from oss_model.taps import LAYER_TAPS
from parity.prompts import Prompt
from parity.protocols import (
    Answers,
    Arrays,
    Asked,
    Expected,
    Moved,
    Oracle,
    OracleLayer,
    Port,
    Question,
    Rows,
    Settings,
    Sizes,
    SupportsReferenceGradients,
    Taps,
    Unanswered,
    Wrongly,
)

FORMAT = 2
MANIFEST = "manifest.json"
SMALL = 1 << 14  # values: norms, sinks and biases
ROPE_STRIDE = 61  # beyond the prompt; every position would be 34 MB
# What the other taps give back to the last bit is not written: without these, 320 tokens of 20b stay below 1 GB.
DERIVED = ("q_rope", "k_rope", "layer_out")


def digest(array: np.ndarray | Rows) -> str:
    """xxh3_128 of a parameter's bytes. float32 that holds nothing but bfloat16 values counts as those."""
    hasher = xxhash.xxh3_128()
    for place in range(len(array)):
        rows = array[place]
        if rows.dtype == np.float32 and not (np.atleast_1d(rows).view(np.uint32) & 0xFFFF).any():
            rows = rows.astype(ml_dtypes.bfloat16)
        hasher.update(np.ascontiguousarray(rows).view(np.uint8).data)
    return hasher.hexdigest()


class Recorder:
    """The reference, with everything it says written to `directory` as it says it.

    Raises:
      InputError: if the directory holds something already.
    """

    def __init__(self, oracle: Oracle, directory: str | Path, prompt: Prompt, described: dict[str, Any]):
        self.oracle, self.directory, self.described = oracle, Path(directory), described
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise InputError(
                f"{directory}: expected a new or empty directory for a recording, found something; give another name"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.hashes: dict[str, dict[str, Any]] = {}
        self.length = prompt.tokens.shape[1]
        self.write("prompt", {"tokens": prompt.tokens, "valid": prompt.valid})

    def write(self, name: str, arrays: Arrays) -> None:
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, self.directory / f"{name}.safetensors")

    @property
    def sizes(self) -> Sizes:
        return self.oracle.sizes

    @property
    def settings(self) -> Settings:
        return self.oracle.settings

    prompt: Prompt | None = None

    @property
    def differentiates(self) -> SupportsReferenceGradients | None:
        return self.oracle.differentiates

    def faults(self, port: Port, asked: Asked) -> list[str]:
        return self.oracle.faults(port, asked)

    def elsewhere(self, n: int, name: str) -> Iterable[Expected]:
        return self.oracle.elsewhere(n, name)

    def answers(self, question: Question) -> Answers:
        found = self.oracle.answers(question)
        self.described["forms"] = _asked(question) | {"eos": list(found.eos)}
        self.write("forms", flat(found))
        return found

    def moved(self, tokens: np.ndarray) -> Moved:
        found = self.oracle.moved(tokens)  # of its own layers: what these say is written
        self.write("moved", {"logits": found.logits, "routing": found.routing, "largest": found.largest})
        return found

    def taps(self, replica: Path | None, rows: list[np.ndarray]) -> Iterator[Taps]:
        return self.oracle.taps(replica, rows)

    def of(self, replica: Path | None) -> Wrongly:
        return self.oracle.of(replica)

    @property
    def rope_positions(self) -> np.ndarray:
        last = self.sizes.max_positions - 1
        return np.unique(np.concatenate([np.arange(self.length), np.arange(0, last, ROPE_STRIDE), [last]]))

    def noting(self, expected: Iterable[Expected]) -> Iterator[Expected]:
        for one in expected:
            assert one.value is not None  # what is recorded has values
            self.hashes[one.name] = {"shape": list(one.shape), "hash": digest(one.value())}
            yield one

    def first_parameters(self) -> Iterator[Expected]:
        return self.noting(self.oracle.first_parameters())

    def last_parameters(self) -> Iterator[Expected]:
        return self.noting(self.oracle.last_parameters())

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        found = self.oracle.embed(tokens, dtype)
        if dtype == np.float32:  # the precision arm's are not the oracle's
            self.write("embedding", {"embedding": found})
        return found

    def layer(self, n: int) -> "_RecordedLayer":
        return _RecordedLayer(self, n)

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        found = self.oracle.unembed(x, forced)
        if x.dtype == np.float32:
            self.write("logits", found)
        return found

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inv_freq, cos, sin = self.oracle.rope_tables(positions)
        self.write("rope", {"positions": positions, "inv_freq": inv_freq, "cos": cos, "sin": sin})
        return inv_freq, cos, sin

    def finish(self) -> None:
        """Without this the recording has no manifest, and is refused."""
        manifest = {"format": FORMAT, **self.described, "sizes": self.sizes._asdict(), "settings": self.settings}
        manifest["parameters"] = self.hashes
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class _RecordedLayer:
    def __init__(self, recorder: Recorder, n: int):
        self.recorder, self.n, self.inner = recorder, n, recorder.oracle.layer(n)

    def parameters(self, packed: bool) -> Iterator[Expected]:
        """Hashes of both the decoded and the packed form: the checkpoint compared later may hold either."""
        for _ in self.recorder.noting(self.inner.parameters(not packed)):
            pass
        return self.recorder.noting(self.inner.parameters(packed))

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        found = self.inner.run(x, forced)
        if x.dtype == np.float32:
            self.recorder.write(f"layer-{self.n:03d}", {name: found[name] for name in LAYER_TAPS if name not in DERIVED})
        return found

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        found = self.inner.experts(x, choice, weights)
        self.recorder.write(f"direct-{self.n:03d}", {"direct": found})
        return found


class Recording:
    """A finished recording, in the place of the reference.

    Raises:
      InputError: if the directory is no finished recording of this format.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.manifest = parse_json((self.directory / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT:
                raise InputError(f"{directory}: expected a recording of format {FORMAT}, found {self.manifest['format']!r}")
            self.sizes = Sizes(**self.manifest["sizes"])
            self.settings: Settings = self.manifest.get("settings", {})  # recordings made before say nothing
            self.source = self.manifest["source"]
            self.prompt = Prompt(**self.read("prompt"))
            self.rope_positions = self.read("rope")["positions"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{directory}: expected a finished recording, found none ({e}); make one with --record") from None

    def __str__(self) -> str:
        return self.source

    def read(self, name: str) -> Arrays:
        return load_file(self.directory / f"{name}.safetensors")

    differentiates: SupportsReferenceGradients | None = None

    def faults(self, port: Port, asked: Asked) -> list[str]:
        where, faults = self.directory, []
        if asked.layers and not self.manifest["layers"]:
            faults.append(f"{where}: recorded without --layers; record it again, or leave --layers out")
        if self.sizes != port.sizes and self.sizes.layers != port.sizes.layers:
            faults.append(f"{where}: recorded of another model: {self.sizes}, the checkpoint has {port.sizes}")
        elif not self._is_of(port):
            faults.append(f"{where}: recorded of another checkpoint: none of its small parameters is the same")
        if asked.gradients:
            faults.append(f"{where}: recorded without gradients; --gradients needs SRC and PyTorch")
        if asked.dtype != self.manifest["dtype"]:
            faults.append(f"{where}: recorded in {self.manifest['dtype']}; --dtype {asked.dtype} needs SRC and PyTorch")
        return faults

    def _is_of(self, port: Port) -> bool:
        """Whether any small parameter of the port is the recorded one: a fine-tuned model's are not all others."""
        noted = self.manifest["parameters"]
        small = [name for name, (shape, _) in port.stored.items() if name in noted and math.prod(shape) <= SMALL]
        return not small or any(digest(value) == noted[name]["hash"] for name, value in port.restore(small).items())

    def elsewhere(self, n: int, name: str) -> Iterator[Expected]:
        return self._expected(lambda full: full.endswith(f".{name}") and full != f"layers.{n}.{name}")

    def _expected(self, belongs) -> Iterator[Expected]:
        for name, noted in self.manifest["parameters"].items():
            if belongs(name):
                yield Expected(name, tuple(noted["shape"]), _against(noted["hash"]), None)

    def first_parameters(self) -> Iterator[Expected]:
        return self._expected(lambda name: name.startswith("embedding."))

    def last_parameters(self) -> Iterator[Expected]:
        return self._expected(lambda name: not name.startswith(("embedding.", "layers.")))

    def answers(self, question: Question) -> Answers:
        noted, wanted = self.manifest.get("forms"), _asked(question)
        if noted is None:
            raise Unanswered("recorded without run forms; record it again, or --forms none")
        if missing := sorted(set(question.kinds) - set(noted["kinds"])):
            raise Unanswered(f"recorded without {', '.join(missing)}; --forms default, or SRC and PyTorch")
        if {name: noted[name] for name in wanted if name != "kinds"} != {
            name: wanted[name] for name in wanted if name != "kinds"
        }:
            raise Unanswered(f"recorded for another model or replica: {noted}, now {wanted}")
        return answers_of(self.read("forms"), tuple(noted["eos"]))

    def moved(self, tokens: np.ndarray) -> Moved:
        if not (self.directory / "moved.safetensors").exists():
            raise Unanswered("recorded before it was asked how far rounding moves it")
        return Moved(**self.read("moved"), taps={})

    def taps(self, replica: Path | None, rows: list[np.ndarray]) -> Iterator[Taps]:
        raise Unanswered("a recording has no taps of run forms")

    def of(self, replica: Path | None) -> Wrongly:
        raise Unanswered("a recording cannot compute anything")

    def embed(self, tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if not np.array_equal(tokens, self.prompt.tokens):
            raise InputError(f"{self.directory}: recorded for another prompt; leave --tokens, --seed and --prompt-file out")
        return self.read("embedding")["embedding"]

    def layer(self, n: int) -> OracleLayer:
        return _ReplayedLayer(self, n)

    def unembed(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        return self.read("logits")

    def rope_tables(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tables = self.read("rope")
        return tables["inv_freq"], tables["cos"], tables["sin"]


class _ReplayedLayer:
    def __init__(self, recording: Recording, n: int):
        self.recording, self.n = recording, n

    def parameters(self, packed: bool) -> Iterator[Expected]:
        other = (".weight",) if packed else (".blocks", ".scales")
        experts = tuple(f"layers.{self.n}.mlp.{name}{leaf}" for name in ("gate_up", "down") for leaf in other)
        known = self.recording.manifest["parameters"]
        if packed and f"layers.{self.n}.mlp.gate_up.blocks" not in known:
            experts = ()
        return self.recording._expected(lambda name: name.startswith(f"layers.{self.n}.") and name not in experts)

    def run(self, x: np.ndarray, forced: Arrays | None = None) -> Arrays:
        taps = self.recording.read(f"layer-{self.n:03d}")
        tables = self.recording.read("rope")
        cos, sin = (tables[name][: x.shape[1], None] for name in ("cos", "sin"))
        derived = {}
        for name in "qk":  # in float32 and in the reference's order, here and below
            a, b = np.split(taps[name], 2, axis=-1)
            derived[f"{name}_rope"] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return taps | derived | {"layer_out": x + taps["attn_out"] + taps["mlp_out"]}

    def experts(self, x: np.ndarray, choice: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return self.recording.read(f"direct-{self.n:03d}")["direct"]


# --- run forms --------------------------------------------------------------------------------------------------

# Of `Answers`, those that are an array a row.
_LISTS = (
    "rows", "margins", "logits", "logits16", "made", "made_margins", "made_seconds", "updated", "moved", "moved_margins",
)  # fmt: skip


def _asked(question: Question) -> dict[str, Any]:
    """What answers are good for."""
    replica = None if question.replica is None else xxhash.xxh3_128_hexdigest((question.replica / "config.json").read_bytes())
    return {"replica": replica, "lengths": list(question.lengths), "new": question.new, "kinds": sorted(question.kinds)}


def flat(answers: Answers) -> Arrays:
    flat = {f"{name}.{n}": one for name in _LISTS for n, one in enumerate(getattr(answers, name) or ())}
    return flat | {f"gradient {name}": value for name, value in (answers.gradients or {}).items()}


def answers_of(flat: Arrays, eos: tuple[int, ...]) -> Answers:
    lists = {}
    for name in _LISTS:
        found = [flat[f"{name}.{n}"] for n in range(len(flat)) if f"{name}.{n}" in flat]
        lists[name] = found if found or name in ("made", "made_margins") else None
    gradients = {name.removeprefix("gradient "): value for name, value in flat.items() if name.startswith("gradient ")}
    return Answers(**lists, eos=eos, gradients=gradients or None)


def _against(recorded: str):
    return lambda got: "" if digest(got) == recorded else f"differs from the recorded one (xxh3_128 {recorded})"
