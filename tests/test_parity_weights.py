"""The weights arm where parameters do not fit: what is said, and that nothing is computed with them."""

import dataclasses

import pytest

from converter import convert
from oss_model.synthetic import write_checkpoint
from parity import compare
from parity.weights import UNFIT


@pytest.fixture(scope="module")
def other(cfg, tmp_path_factory):
    """A checkpoint of the same model with narrower experts."""
    root = tmp_path_factory.mktemp("other")
    write_checkpoint(root / "source", dataclasses.replace(cfg, intermediate_size=128))
    convert(root / "source", root / "dst", verify=False)
    return root / "dst"


def test_parameters_of_other_shapes_are_told_and_not_computed_with(sources, other):
    report = compare(sources["hf"], other, tokens=24)
    assert report.verdict == "fail"
    assert report.incomplete == [UNFIT]
    wrong = {weight.name: weight.note for weight in report.weights if weight.note.startswith("shape")}
    assert wrong["layers.0.mlp.gate_up.weight"] == "shape [9, 2, 128, 96], should be [9, 2, 160, 96]"
    assert len(wrong) == 3 * 5
    assert {tap.layer for tap in report.taps} == {None}
    assert report.free_run is None
