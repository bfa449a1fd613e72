"""Extractors where their model is: ``FEATX_DEVICE=cuda`` runs this file on a GPU, and else it runs on the CPU."""

from __future__ import annotations

import copy
import functools
import io
import os
import shutil
from typing import Any, Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests import helpers
from tests.helpers import (
    COPIES,
    check_flips,
    exact,
    extract,
    ignored_warnings,
    in_both_modes,
    node_names,
    parametrize,
    recording,
    run,
    same,
    select,
    snapshot,
    tensors,
)
from tests.nets import Block, Modes, build_with_input, net
from tests.versions import older

DEVICE = torch.device(os.environ.get("FEATX_DEVICE", "cpu"))
# On the CPU inductor's code is test_ecosystem.py's, and takes a minute to build.
BACKEND = "inductor" if DEVICE.type == "cuda" and shutil.which("g++") else "aot_eager"
X = helpers.X.to(DEVICE)
BOTH = ["body", "head", "output"]

on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has CUDA graphs: FEATX_DEVICE=cuda")


def modules_called_once(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Path of a module -> what it returns in eager execution, if that is a tensor."""
    with recording(model) as calls:
        run(model, x)
    paths = [path for path, _ in calls]
    return {path: value for path, value in calls if isinstance(value, torch.Tensor) and paths.count(path) == 1 and path}


@parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_32", "swin_t"])
@in_both_modes
def test_every_module_gives_what_it_gives_in_eager_execution(name: str, mode: bool) -> None:
    model, x = build_with_input(name)
    model, x = model.to(DEVICE).train(mode), x.to(DEVICE)
    known = select(node_names(model, exact=True)[not mode])  # what lies in a leaf is not
    expected = modules_called_once(copy.deepcopy(model), x)
    expected = {path: value for path, value in expected.items() if path in known}
    assert len(expected) > 15
    found = run(exact(model, list(expected)), x)
    assert set(found) == set(expected)
    assert all(same(found[path], expected[path]) for path in expected)
    assert {value.device.type for value in found.values()} == {DEVICE.type}


def scaled() -> nn.Module:
    """A buffer, and a write in place."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x) * self.scale
        h.relu_()
        return h + torch.ones_like(h)

    return net(forward, inner=Block(), scale=torch.arange(4.0))


@parametrize("create", [extract, exact])
@parametrize("make", [Modes, scaled])
def test_made_on_the_cpu_and_moved(create: Callable[..., Any], make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    extractor = create(copy.deepcopy(model), "output").to(DEVICE)
    assert {value.device.type for value in extractor.state_dict().values()} == {DEVICE.type}
    assert same(run(extractor, X)["output"], run(model.to(DEVICE), X))


@parametrize("create", [extract, exact])
def test_a_constant_of_the_forward_moves_with_the_extractor(create: Callable[..., Any]) -> None:
    extractor = create(net(lambda self, x: x * torch.arange(4.0)), "mul").to(DEVICE)
    assert same(run(extractor, X)["mul"], X * torch.arange(4.0, device=DEVICE))


def by_hand(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """In the model's own mode."""
    body = model.body(x)
    head = model.head(body)
    output = head + model.aux(body).mean() if model.training else head * 2
    return {"body": body, "head": head, "output": output}


def test_modes() -> None:
    model = Modes().to(DEVICE)
    extractor = extract(model, BOTH)
    check_flips(lambda: run(extractor, X), lambda: run(lambda x: by_hand(model, x), X), extractor, model)


@parametrize("how", COPIES)
@in_both_modes
def test_copies(how: str, mode: bool) -> None:
    model = Modes().to(DEVICE)
    extractor = extract(model, BOTH).train(mode)
    twin = COPIES[how](extractor)
    for each in (mode, not mode):
        twin.training = extractor.training = each
        values = run(twin, X)
        assert same(values, run(extractor, X))
        assert {value.device.type for value in tensors(values)} == {DEVICE.type}


def test_a_file_opens_on_the_cpu() -> None:
    extractor = extract(scaled().to(DEVICE), "output")
    file = io.BytesIO()
    torch.save(extractor, file)
    file.seek(0)
    opened = torch.load(file, map_location="cpu", **({"weights_only": False} if not older(torch="2.0") else {}))
    assert_close(run(opened, X.cpu())["output"], run(extractor, X)["output"].cpu())


def asking() -> nn.Module:
    """Asks where its input is, and how many rows it has."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x) + torch.arange(x.shape[1], device=x.device)
        return h * 2 if len(x) < 5 and x.is_floating_point() else h

    return net(forward, inner=Block())


def test_an_example_on_the_device() -> None:
    model = asking().to(DEVICE)
    extractor = exact(model, ["inner", "output"], example_inputs=(X,))
    assert same(run(extractor, X - 1), {"inner": run(model.inner, X - 1), "output": run(model, X - 1)})
    with pytest.raises(AssertionError, match="len"):
        run(extractor, torch.cat([X, X]))


def test_autocast() -> None:
    model = Modes().eval().to(DEVICE)
    extractor = extract(model, BOTH)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, expected = run(extractor, X), run(lambda x: by_hand(model, x), X)
    assert same(found, expected)
    assert found["head"].dtype is torch.bfloat16


class Small(nn.Module):
    """Compiles in seconds; what the second layer returns depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.third = nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def check_compiled(call: Callable[[torch.Tensor], Any], model: nn.Module, *inputs: torch.Tensor) -> None:
    """Close and not equal: what is compiled adds up in another order."""
    for x in inputs:
        with recording(model) as calls:
            run(model, x)
        expected = {path: value for path, value in calls if path in ("first", "second")}
        assert_close(snapshot(run(call, x)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(older(torch="2.6"), reason="what torch.compile can do changes with each release")
def test_compiled() -> None:
    model = Small().to(DEVICE)
    extractor = exact(model, ["first", "second"])
    with ignored_warnings():
        torch.compiler.reset()
        compiled = torch.compile(extractor, backend=BACKEND, fullgraph=True)
        for mode in (False, True, False):
            model.train(mode)
            extractor.train(mode)
            check_compiled(compiled, model, IMAGES, IMAGES * 2)


def stages_by_hand(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    first = model.layer1(x)
    return {"layer1": first, "layer4": model.layer4(model.layer3(model.layer2(first)))}


def recorded(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """What replays a CUDA graph of a call, after some calls for what is set up at the first."""
    given = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = call(given)

    def replay(values: torch.Tensor) -> Any:
        given.copy_(values)
        graph.replay()
        return snapshot(found)

    return replay


@on_a_gpu
def test_a_cuda_graph() -> None:
    """A replay gives what the same calls by hand give when they are replayed, and for other values other features."""
    model, x = build_with_input("resnet18")
    model, x = model.eval().to(DEVICE), x.to(DEVICE)
    expected = functools.partial(stages_by_hand, model)
    replay, reference = recorded(exact(model, ["layer1", "layer4"]), x), recorded(expected, x)
    for values in (x, x * 2, x.flip(0)):
        found = replay(values)
        assert same(found, reference(values))
        assert_close(found, run(expected, values), rtol=1e-3, atol=1e-3)


@on_a_gpu
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_cuda_graphs_of_torch_compile() -> None:
    model = Small().eval().to(DEVICE)
    with ignored_warnings():
        torch.compiler.reset()
        compiled = torch.compile(exact(model, ["first", "second"]), mode="reduce-overhead")
        check_compiled(compiled, model, IMAGES, IMAGES * 2, IMAGES.flip(0), IMAGES)
