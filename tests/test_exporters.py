"""Exporters that need packages of their own: the values come in the order of execution, and the keys are lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import extract, parametrize
from tests.nets import build
from tests.test_ecosystem import IMAGES, Values, eager

# What these tools, and what they import, say about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

KEYS = {"layer2": "z", "layer1": "a.deep"}  # the later one is asked for first


def exported() -> tuple[Any, Values]:
    """The program of an extractor, and what the modules return in eager execution."""
    model = build("resnet18").eval()
    extractor = extract(model, KEYS)
    expected = eager(model, KEYS, IMAGES)
    assert list(extractor(IMAGES)) == list(expected) == ["a.deep", "z"]
    return torch.export.export(extractor, (IMAGES,)), expected


def test_executorch() -> None:
    exir = pytest.importorskip("executorch.exir")
    from executorch.runtime import Runtime

    program, expected = exported()
    file = exir.to_edge_transform_and_lower(program).to_executorch().buffer
    loaded = Runtime.get().load_program(file)
    values = loaded.load_method("forward").execute([IMAGES])
    assert isinstance(values, list)
    assert_close(values, list(expected.values()), rtol=1e-4, atol=1e-5)


@parametrize(
    ("names", "given"),
    [
        (None, ["relu_4", "relu_8"]),
        (["a.deep", "z"], ["a_deep", "z"]),
        (["z", "a.deep"], ["z", "a_deep"]),  # the order of the queries: each name is on the other value
    ],
    ids=str,
)
def test_coremltools(names: list[str] | None, given: list[str]) -> None:
    """Only macOS computes values, so shapes say which is which."""
    coremltools = pytest.importorskip("coremltools")
    program, expected = exported()
    outputs = names and [coremltools.TensorType(name=name) for name in names]
    model = coremltools.convert(program.run_decompositions({}), outputs=outputs)
    found = model.get_spec().description.output
    assert [output.name for output in found] == given
    shapes = [torch.Size(output.type.multiArrayType.shape) for output in found]
    assert shapes == [value.shape for value in expected.values()]
