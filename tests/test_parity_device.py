"""Where the port computes: what float32 does on a device, and what is not taken for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oss_model import InputError, attention, expert_paths, layers
from parity import compare, device, equations
from parity.candidate import Candidate
from parity.noise import TAKEN, Noise, bound

TF32 = np.uint32(0xFFFFE000)  # the 10 bits of mantissa that a GPU multiplies by, where it is not told otherwise


def rounded(x):
    if x.dtype != jnp.float32:
        return x
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & TF32, jnp.float32)


@pytest.mark.long
def test_the_equations_on_the_device_are_those_of_numpy(checkpoints, sources, monkeypatch):
    """Every tap that has a gate of its own, and each to within the noise it is there to measure."""
    seen = {}

    def both(name, t, p, s):
        seen[name] = device.noise(name, t, p, s), equations.noise(name, t, p, s), equations.tap(name, t, p, s)
        return seen[name][0]

    monkeypatch.setattr(Candidate, "can", property(lambda self: self._can._replace(noise=both)))
    report = compare(sources["hf"], checkpoints["bfloat16"], tokens=24)
    assert (report.verdict, report.errors) == ("pass", [])
    assert len(seen) >= 14
    for name, (there, here, exact) in seen.items():
        assert there.dtype == np.float32, name
        scale = np.abs(exact).max()
        assert np.abs(there - exact).max() <= max(20 * np.abs(here - exact).max(), 1e-6 * scale), name


@pytest.mark.long
def test_what_is_no_noise_of_float32_is_reported_and_not_taken(checkpoints, sources, monkeypatch):
    """A device that multiplies in TF32 would widen the gate that is to find it."""
    right = layers.contract
    for module in (layers, attention, expert_paths):
        monkeypatch.setattr(module, "contract", lambda spec, x, y: right(spec, rounded(x), rounded(y)))
    at_fault = Candidate(checkpoints["bfloat16"])

    def tf32(name, t, p, s):
        cut = {key: np.asarray(rounded(jnp.asarray(value))) if value.dtype == np.float32 else value for key, value in t.items()}
        return equations.noise(name, cut, p, s)

    monkeypatch.setattr(Candidate, "can", property(lambda self: self._can._replace(noise=tf32)))
    report = compare(sources["hf"], at_fault, tokens=24)
    assert report.verdict == "fail"
    assert (report.first_divergence or {})["tap"] == "q"
    assert any("layer 0 q: on the device the equation in float32 is" in line for line in report.warnings)
    q = next(tap for tap in report.taps if (tap.layer, tap.tap) == (0, "q"))
    assert q.gate is not None
    assert q.gate < 1e-5


def test_a_gate_is_of_the_noisier_of_both_up_to_a_bound():
    here = Noise(1e-6, None, 1e-7)
    assert here.gate == bound(1e-6)
    assert here._replace(device=3e-6).gate == bound(3e-6)
    assert here._replace(device=1e-6 * TAKEN * 1.01).gate == bound(1e-6)


def test_a_device_that_is_not_there_is_said():
    before = jax.config.jax_default_device  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="--device tpu: expected one that JAX can use, found cpu alone"), \
         device.computing_on("tpu"):  # fmt: skip
        pass
    with device.computing_on("cpu") as there:
        assert there.platform == "cpu"
        assert next(iter(jnp.zeros(3).devices())) == there
    assert jax.config.jax_default_device == before  # type: ignore[attr-defined]


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="no GPU or TPU here")
@pytest.mark.parametrize("fault", [False, True])
def test_on_an_accelerator_full_float32_passes_and_less_fails(checkpoints, sources, monkeypatch, fault):
    if fault:
        without = lambda spec, x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)  # noqa: E731
        for module in (layers, attention, expert_paths):
            monkeypatch.setattr(module, "contract", without)
        jax.clear_caches()
    report = compare(sources["hf"], checkpoints["bfloat16"], tokens=24)
    assert report.device
    assert report.verdict == ("fail" if fault else "pass"), report.table()
