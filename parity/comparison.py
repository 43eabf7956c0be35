"""A comparison: what is asked for, whether it can be had, and everything that is then run."""

import contextlib
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from oss_model.buckets import path_of
from oss_model.errors import InputError, raise_all
from oss_model.memory import peak_rss
from oss_model.params import is_orbax
from oss_model.terminal import counted
from parity import configs
from parity.arms import Arms, Progress
from parity.design import by_design
from parity.device import here
from parity.forms_arm import compare_forms, compare_long
from parity.memory import check_free_memory, check_memory, fits
from parity.prompts import Prompt, random_prompt, unequal_prompt
from parity.protocols import Asked, Oracle, Port, Unanswered
from parity.recording import Recorder
from parity.reports.report import Report
from parity.weights import unmatched


def compare(
    source: "str | Path | Oracle",
    checkpoint: "str | Path | Port",
    *,
    layers: bool = True,
    tokens: int | None = None,
    seed: int = 0,
    prompt: Prompt | None = None,
    dtype: str = "float32",
    decode: bool = False,
    gradients: bool = False,
    forms: str = "none",
    long: bool = False,
    expect_changed: Sequence[str] = (),
    record: str | Path | None = None,
    max_memory: int | None = None,
    read_with_orbax: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Report:
    """Compare a model with the safetensors it was made from.

    Args:
      source: the safetensors directory, read and computed by transformers alone; or a recording of that.
      checkpoint: the Orbax checkpoint, or other safetensors, computed by our `Transformer`; or a model of one's own
        (`parity.protocols.Port`). Of two directories the reference is the one of safetensors; where both are Orbax
        checkpoints, their bytes alone are compared.
      layers: run the semantics arm, every tap of every layer. Without it: weights and free run only.
      tokens: length of the random prompt; if None, 2.5 times the sliding window, and of a small model a second, shorter row.
      seed: of the random prompt.
      prompt: to use in place of a random one.
      dtype: "bfloat16" adds the precision arm and a free run in bfloat16; what is judged otherwise is always float32.
      gradients: also compare every parameter's gradient on the longest row of the prompt, of models that fit in memory
        whole.
      forms: "default", "all" or "none" of the ways to run the whole model (`parity.forms`).
      long: also run a row of several thousand tokens through a small replica, whole and compiled.
      expect_changed: regular expressions, each matched against whole names of parameters that were trained: they are listed
        with how far they moved, everything else must be exact, and the code is judged on the source's values.
      record: a new directory to write what the reference says to, for `parity.recording.Recording`.
      decode: also decode the prompt a token at a time on the key-value cache.
      max_memory: resident bytes, all in, that it may take at the most.
      read_with_orbax: compare what plain Orbax reads in every chunk of DST. Otherwise that of one chunk of each parameter is
        compared, and of the rest what our reader, with its checksums, reads.
      progress: called with (layers done, layers in all, what is being done).

    Raises:
      InputError: if either cannot be read, if the prompt is longer than the model's positions, if gradients are asked for
        of one without a next token, if `max_memory` is too little, or not known to be enough.
    """
    start = time.monotonic()
    if isinstance(checkpoint, str | Path):
        from parity.candidate import Candidate
        from parity.stored import arranged, compare_stored, holds_values, layout_faults

        if isinstance(source, str | Path):
            source, checkpoint = arranged(path_of(source), path_of(checkpoint))
            raise_all(layout_faults(source))
            if is_orbax(source):
                return compare_stored(source, checkpoint, seed=seed, expect_changed=expect_changed, progress=progress)
        made_from = path_of(source) if isinstance(source, str | Path) else None
        design = None if made_from is None else by_design(made_from, path_of(checkpoint))
        options = {"memory": max_memory, "read_with_orbax": read_with_orbax}
        port: Port = Candidate(checkpoint, source=made_from, values=holds_values(made_from or source), **options)
    else:
        port, design = checkpoint, None
    if isinstance(source, str | Path):
        from parity.reference import Reference

        oracle: Oracle = Reference(source)
    else:
        oracle = source
    window = oracle.sizes.window
    raise_all([*oracle.faults(port, Asked(layers, dtype, gradients)), *unmatched(expect_changed, port)])
    if prompt is None and tokens is None:
        prompt = oracle.prompt
    if prompt is None and tokens is None and port.can.calls is not None and fits(port, max_memory):
        prompt = unequal_prompt(oracle.sizes.vocab, math.ceil(2.5 * window), seed)
    if prompt is None:
        prompt = random_prompt(oracle.sizes.vocab, math.ceil(2.5 * window) if tokens is None else tokens, seed)
    longest = int(prompt.valid.sum(axis=1).max())
    limit = oracle.sizes.max_positions
    if longest > limit:
        raise InputError(
            f"--tokens or --prompt-file: expected at most {limit} tokens, the model's max_position_embeddings, found {longest}"
        )
    if gradients and longest < 2:
        raise InputError(
            f"--gradients: expected a prompt of at least 2 tokens, since the loss is that of the next one, found {longest};"
            " use --tokens 2 or more, or a longer prompt"
        )
    if max_memory is not None:
        check_memory(port, prompt.tokens.shape, max_memory, gradients, forms != "none")
    if gradients and port.can.gradients is not None:
        check_free_memory(port)
    watched, recorder = oracle, None
    if record is not None:
        described = {"source": str(source), "dtype": "float32", "layers": layers, "versions": _versions()}
        watched = recorder = Recorder(oracle, record, prompt, described)
    device = here().device_kind if port.can.noise is not None else ""
    title, warnings = configs.title(oracle.sizes, oracle.settings)
    report = Report(str(source), str(checkpoint), title, longest, seed, layers, dtype, device=device, warnings=warnings)
    if dtype == "bfloat16" and not layers:
        report.lacks("precision: it is judged tap by tap, which takes --layers: only the free run was made in bfloat16")
    if longest < 2 * window:
        report.incomplete.append(
            f"{longest} tokens, but faults of the sliding window ({window}) only show from {2 * window} on:"
            f" use --tokens {2 * window}"
        )
    Arms(port, watched, report, prompt, dtype == "bfloat16", decode, progress, tuple(expect_changed), design).whole()
    if gradients and report.righted:
        report.lacks("gradients: they would be of other values than SRC's: they were not compared")
    elif gradients and report.free_run is not None:
        row = int(prompt.valid.sum(axis=1).argmax())
        _gradients(oracle, port, report, prompt.tokens[row : row + 1, :longest])
    if forms != "none":
        whole = not report.righted and fits(port, max_memory)  # else a replica: these would be of other values than SRC's
        compare_forms(port, watched, report, forms, fits=whole, seed=seed, progress=progress)
    if long:
        compare_long(port, oracle, report, seed=seed, progress=progress)
    if recorder is not None:
        recorder.finish()
    report.seconds = time.monotonic() - start
    report.peak_rss_bytes = peak_rss()
    return report


def _gradients(oracle: Oracle, port: Port, report: Report, tokens: np.ndarray) -> None:
    """The gradients arm, on tokens [1, length]; what a side has no gradient of is said to be incomplete."""
    from parity.gradients import compare_gradients

    if port.can.gradients is None:
        report.lacks("gradients: the port has none (parity.protocols.SupportsGradients): they were not compared")
    elif oracle.differentiates is None:
        report.lacks("gradients: the reference has none: they were not compared")
    else:
        want, routing = oracle.differentiates.gradients(tokens)
        got = port.can.gradients.gradients(tokens, routing)
        names = [name for name in port.stored or want if name in want]
        missing = [name for name in names if name not in got]
        if missing:
            report.lacks(f"gradients: the port gave none of {counted(len(missing), 'parameter')}, the first {missing[0]}")
        names = [name for name in names if name in got]
        report.gradients = compare_gradients(want, got, names)
        if report.wrong_gradients and not any(tap.verdict == "fail" for tap in report.taps):
            with contextlib.suppress(Unanswered):
                report.gradients = compare_gradients(want, got, names, oracle.of(None).moved_gradients(tokens))
            if noise := [one["name"] for one in report.gradients if one["verdict"] == "incomplete"]:
                count = f"{counted(len(noise), 'parameter')}, {noise[0]} among them"
                report.lacks(f"gradients: rounding alone moves PyTorch's by a tenth and more for {count}")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy")}
