"""What `parity.forms` hands to a child process, and what comes back: JSON beside safetensors, in a directory."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from oss_model.buckets import path_of
from oss_model.config import ModelConfig
from parity.protocols import Answers, Arrays, Taps
from parity.recording import answers_of, flat

JOB, RESULTS = "job", "results"
Result = list[np.ndarray] | Arrays | Taps | str
Runs = list[tuple[str, str]]


class Job(NamedTuple):
    """See `parity.forms.Forms`, and its `run`."""

    path: Path
    cfg: ModelConfig
    packed: Path | None
    runs: Runs
    asked: Answers


def write_job(directory: Path, job: Job) -> None:
    said = {
        "path": str(job.path),
        "cfg": dataclasses.asdict(job.cfg) | {"dtype": np.dtype(job.cfg.dtype).name},
        "packed": None if job.packed is None else str(job.packed),
        "runs": job.runs,
        "eos": job.asked.eos,
    }
    _write(directory, JOB, said, flat(job.asked))


def read_job(directory: Path) -> Job:
    said, arrays = _read(directory, JOB)
    packed = None if said["packed"] is None else path_of(said["packed"])
    cfg = ModelConfig(**said["cfg"] | {"layer_types": tuple(said["cfg"]["layer_types"])})
    runs = [(form, dtype) for form, dtype in said["runs"]]
    return Job(path_of(said["path"]), cfg, packed, runs, answers_of(arrays, tuple(said["eos"])))


def write_results(directory: Path, results: list[Result]) -> None:
    said: list[Any] = []
    arrays: Arrays = {}
    for result in results:
        if isinstance(result, str):
            said.append(result)
            continue
        keyed = result.items() if isinstance(result, dict) else [(None, result)]
        said.append([[key, len(value) if isinstance(value, list) else None] for key, value in keyed])
        for _, value in keyed:
            for one in value if isinstance(value, list) else [value]:
                arrays[str(len(arrays))] = one
    _write(directory, RESULTS, said, arrays)


def read_results(directory: Path) -> list[Result] | None:
    """None where none were written."""
    if not (directory / f"{RESULTS}.json").exists():
        return None
    said, arrays = _read(directory, RESULTS)
    following = (arrays[str(number)] for number in range(len(arrays)))
    results: list[Result] = []
    for one in said:
        if isinstance(one, str):
            results.append(one)
            continue
        keyed: Any = {}
        for key, count in one:
            value = next(following) if count is None else [next(following) for _ in range(count)]
            keyed[tuple(key) if isinstance(key, list) else key] = value
        results.append(keyed.get(None, keyed))
    return results


def _write(directory: Path, name: str, said: Any, arrays: Arrays) -> None:
    """The JSON last, in one step: where it is, all of it is."""
    save_file({key: np.asarray(value, order="C") for key, value in arrays.items()}, directory / f"{name}.safetensors")
    aside = directory / f"{name}.json.partial"
    aside.write_text(json.dumps(said))
    aside.rename(directory / f"{name}.json")


def _read(directory: Path, name: str) -> tuple[Any, Arrays]:
    return json.loads((directory / f"{name}.json").read_text()), load_file(directory / f"{name}.safetensors")
