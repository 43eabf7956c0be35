"""Strict JAX, and small checkpoints made once a session.

oss_model is imported inside the fixtures: jaxtyping's import hook, which checks every shape in its signatures at
run time, is installed after this file is read.
"""

import atexit
import contextlib
import dataclasses
import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from converting import contents

# Hundreds of small models are compiled, each for one call: LLVM's optimisations take half of the suite's time. They are
# none of XLA's own passes, which stay; XLA_FLAGS= (empty) has them too, as scripts/matrix does.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
# What one process has compiled, the others find: those of the tests, and those that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else is on the first
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run in two processes, and threads that wait for each other's core take ten times as long. By the environment for what is
# started from here: pytest-xdist's processes, and those of tests.
torch.set_num_threads(1)
for library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Compiled ones are forgotten when there are many: each takes maps of memory, of which Linux gives a process 65,530.

    And the process keeps its limits: XLA aborts, files later, where a test that bounds memory has left the bound.
    """
    kinds = resource.RLIMIT_AS, resource.RLIMIT_FSIZE
    limits = [*map(resource.getrlimit, kinds)]
    yield
    assert [*map(resource.getrlimit, kinds)] == limits
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def cfg():
    """The model of the tests, computed in float32: every size distinct, prompts longer than its window of 11."""
    from oss_model import ModelConfig

    return dataclasses.replace(ModelConfig.tiny(), dtype=np.float32)


@pytest.fixture(scope="session")
def sources(tmp_path_factory, cfg) -> dict[str, Path]:
    """The same small model in every layout that is written: layout name -> directory. Read only."""
    from oss_model.synthetic import write_checkpoint

    root = tmp_path_factory.mktemp("sources")
    return {layout: write_checkpoint(root / layout, cfg, layout) for layout in ("hf", "hf-bf16", "openai")}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, sources) -> dict[str, Path]:
    """The same model converted from packed Hugging Face safetensors: stored dtype -> Orbax directory. Read only."""
    from converter import convert

    root = tmp_path_factory.mktemp("checkpoints")
    for dtype in ("bfloat16", "float32", "mxfp4"):
        convert(sources["hf"], root / dtype, dtype=dtype)
    return {dtype: root / dtype for dtype in ("bfloat16", "float32", "mxfp4")}


@pytest.fixture(scope="session")
def even_cfg():
    """A model whose sizes divide by 8, for meshes; packed experts divide by 2 along their inner axis."""
    from oss_model import ModelConfig

    sizes = {"vocab_size": 512, "intermediate_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "num_experts": 16}
    return dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=2, layer_types=(), dtype=np.float32, **sizes)


@pytest.fixture(scope="session")
def even_checkpoints(tmp_path_factory, even_cfg) -> dict[str, Path]:
    """Stored dtype -> Orbax directory of that model. Read only."""
    from converter import convert
    from oss_model.synthetic import write_checkpoint

    root = tmp_path_factory.mktemp("even")
    write_checkpoint(root / "source", even_cfg)
    for dtype in ("float32", "mxfp4"):
        convert(root / "source", root / dtype, dtype=dtype)
    return {dtype: root / dtype for dtype in ("float32", "mxfp4")}


@pytest.fixture(scope="session")
def prompt() -> np.ndarray:
    """int32 [2, 40]: more than three windows."""
    return np.random.default_rng(0).integers(0, 509, (2, 40), dtype=np.int32)


@pytest.fixture
def start():
    """`subprocess.Popen`, of processes that end with the test, whatever becomes of it."""
    with contextlib.ExitStack() as stack:

        def begin(command: list, **options) -> subprocess.Popen:
            process = stack.enter_context(subprocess.Popen(command, **options))
            stack.callback(process.kill)
            return process

        yield begin


@pytest.fixture
def gcs(monkeypatch):
    """A bucket called `bucket`, to which this process's own gs:// goes, with retries that take no time."""
    from gcs_server import Gcs

    from oss_model import buckets

    found = Gcs()
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(buckets, "_thread", threading.local())  # clients of the bucket of another test
    monkeypatch.setattr(buckets, "WAIT_SECONDS", 0.001)
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 5.0)
    yield found
    found.close()
    gc.collect()  # while the filters of this test count: connections that nobody refers to any more


# --- reports ----------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy():
    """Of a right model."""
    from reporting import healthy_report

    return healthy_report()


@pytest.fixture
def broken():
    """Of every kind of fault one, and more flips than are shown at once."""
    from reporting import broken_report

    return broken_report()


# --- conversions that are cut off -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hf(sources) -> Path:
    return sources["hf"]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A source of one layer, where the number of chunks does not matter."""
    from oss_model import ModelConfig
    from oss_model.synthetic import write_checkpoint

    cfg = dataclasses.replace(ModelConfig.tiny(), num_hidden_layers=1, layer_types=())
    return write_checkpoint(tmp_path_factory.mktemp("small") / "source", cfg)


@pytest.fixture(scope="session")
def small_out(small, tmp_path_factory) -> Path:
    """Converted, as float32. Read only."""
    from converter import convert

    out = tmp_path_factory.mktemp("small") / "out"
    convert(small, out, "float32", verify=False)
    return out


@pytest.fixture(scope="session")
def small_whole(small, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted conversion of it to bfloat16 writes."""
    from converter import convert

    out = tmp_path_factory.mktemp("small") / "out"
    convert(small, out, verify=False)
    return contents(out)


@pytest.fixture(scope="session")
def whole(hf, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    from converter import convert

    out = tmp_path_factory.mktemp("whole") / "out"
    convert(hf, out, verify=False)
    return contents(out)


@pytest.fixture
def fail_after(monkeypatch):
    """Make the n-th chunk fail, half written, as a full disk does."""
    from converter.store import Store

    def install(count: int) -> None:
        write, left = Store.write_chunk, [count]

        def failing(self, chunk, pieces):
            left[0] -= 1
            if left[0] < 0:
                path = self.directory / chunk.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, chunk, pieces)

        monkeypatch.setattr(Store, "write_chunk", failing)

    yield install
    monkeypatch.undo()


def pytest_collection_modifyitems(items):
    """Files that take longest first (scripts/test hands them out in this order): none is left over for one process."""
    longest = ("parity_faults", "oss_model_processes", "docs", "finetune", "parity_arms", "parity_diagnosis", "parity_memory")
    order = {f"test_{name}": n for n, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
