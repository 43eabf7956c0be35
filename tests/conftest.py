"""Strict JAX, and small checkpoints made once a session.

oss_model is imported inside the fixtures: jaxtyping's import hook, which checks every shape in its signatures at
run time, is installed after this file is read.
"""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

# Hundreds of small models are compiled, each for one call: LLVM's optimisations take half of the suite's time. They are
# none of XLA's own passes, which stay; XLA_FLAGS= (empty) has them too, as scripts/matrix does.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else is on the first
torch.set_num_threads(1)  # tests run in two processes, and threads that wait for each other's core take ten times as long


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
