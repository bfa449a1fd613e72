"""What is built around models, run for real on extractors: each tool gives what it gives for the eager model."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple

import pytest
import torch
from torch import equal, fx, nn
from torch.nn import Sequential
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests import featx, helpers
from tests.helpers import (
    ROOT,
    as_it_is,
    check_flips,
    differ,
    in_both_modes,
    parametrize,
    python,
    recording,
    same,
    seeded,
    snapshot,
)
from tests.nets import Block, build, linear, net
from tests.versions import needs

# fully_shard became public with torch 2.6; the tools that all of this is about change with each release.
pytestmark = needs("torch.distributed.fsdp.fully_shard", torch="2.6")
if pytestmark.args[0]:
    pytest.skip(pytestmark.kwargs["reason"], allow_module_level=True)
else:
    from torch._subclasses import FakeTensorMode
    from torch.distributed.fsdp import fully_shard
    from torch.func import functional_call, vmap
    from torch.utils.flop_counter import FlopCounterMode

OPTIONS: list[dict[str, Any]] = [{}, {"exact": True}]
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODES = {"body": "b", "head": "h"}
BLOCKS = {"0": "low", "1": "high"}
RESNET = {"layer1": "low", "layer2": "high"}
# Outputs of modules of the zoo that no later operation overwrites, none of them the last.
ZOO = {
    "resnet18": ["relu", "layer1", "layer3.0"],
    "mobilenet_v3_small": ["features.1", "features.4", "features.9"],
    "swin_t": ["features.0", "features.1.1", "features.3"],
}
Extract = Callable[..., nn.Module]
Values = Dict[str, torch.Tensor]


@pytest.fixture(params=OPTIONS, ids=str)
def extract(request: pytest.FixtureRequest) -> Extract:
    return functools.partial(helpers.extract, **request.param)


class Branches(nn.Module):
    """The same features on two ways: each mode has operations that the other lacks, before the last feature."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Sequential(Block(), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.aux = linear()
        self.head = linear()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        body = self.body(x)
        body = body + self.aux(body) if self.training else body * 2
        return self.last(torch.sigmoid(self.head(body)))


def blocks() -> nn.Module:
    return Sequential(Block(), Block(), nn.Linear(4, 2))


def small_vit() -> nn.Module:
    return pytest.importorskip("torchvision.models").VisionTransformer(
        image_size=32, patch_size=16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64
    )


def eager(model: nn.Module, paths: Mapping[str, str], x: torch.Tensor, clone: bool = True) -> Values:
    """What modules return while the whole model runs, under their keys.

    Without clones it is for gradients: a clone changes the order in which autograd adds up three of them.
    """
    with recording(model, snapshot if clone else as_it_is) as calls:
        seeded(model, x)
    values = {paths[path]: value for path, value in calls if path in paths}
    assert len(values) == len(paths), "a module did not run"
    return values


def case_of(name: str) -> tuple[nn.Module, dict[str, str], torch.Tensor]:
    """A model, two modules of it with keys, and an input."""
    if name == "Branches":
        return Branches(), MODES, X
    if name == "blocks":
        return blocks(), BLOCKS, X
    if name == "vit":
        layer = "encoder.layers.encoder_layer"
        return small_vit(), {f"{layer}_0.mlp": "low", f"{layer}_1.mlp": "high"}, IMAGES
    return build(name), RESNET, IMAGES


def check(
    extractor: Callable[..., Any], model: nn.Module, paths: Mapping[str, str] = MODES, x: torch.Tensor = X
) -> Values:
    """The features, which are what the modules return."""
    values = seeded(extractor, x)
    assert same(values, eager(model, paths, x))
    return values


def loss_of(values: Values) -> torch.Tensor:
    return torch.stack([(value.float() ** 2).mean() for value in values.values()]).sum()


def gradients(values: Values, module: nn.Module) -> Values:
    names, parameters = zip(*module.named_parameters())
    found = torch.autograd.grad(loss_of(values), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found))


# --- torch.compile ---


def test_compile(extract: Extract) -> None:
    model = Branches()
    extractor = extract(model, MODES)
    # Inductor draws random numbers in its own way unless it is told not to.
    options = {"options": {"fallback_random": True}} if BACKEND == "inductor" else {}
    torch.compiler.reset()
    for outer in (extractor, Sequential(extractor)):
        compiled = torch.compile(outer, backend=BACKEND, fullgraph=True, **options)
        seen = []
        for flipped, mode in ((compiled, True), (outer, False), (extractor, True), (compiled, False)):
            flipped.train(mode)
            model.train(mode)
            expected = eager(model, MODES, X)
            expected_gradients = gradients(expected, extractor)
            actual = seeded(compiled, X)
            # Inductor makes kernels of its own.
            assert_close(actual, expected)
            assert_close(gradients(actual, extractor), expected_gradients)
            seen.append(actual)
        assert differ(seen[0], seen[1]), "the modes do not differ, so this shows nothing"


def test_compile_recompiles_for_a_new_mode_only(extract: Extract) -> None:
    model = Branches()
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(extract(model, MODES), backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        check_flips(lambda: seeded(compiled, X), lambda: eager(model, MODES, X), compiled, model)
    assert len(graphs) == 2


# --- torch.export ---


@in_both_modes
@parametrize("name", ["Branches", "resnet18"])
def test_export_to_a_file(extract: Extract, name: str, mode: bool, tmp_path: Path) -> None:
    model, paths, x = case_of(name)
    extractor = extract(model.train(mode), paths)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(extractor, (x,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "extractor.pt2")
    loaded = torch.export.load(tmp_path / "extractor.pt2")
    assert not [name for name in loaded.state_dict if name.startswith(("layer3", "layer4", "fc", "last"))]
    for images in (x, x[:3], torch.cat([x, x.neg()])):
        check(loaded.module(), model, paths, images)


# --- TorchScript ---


def test_jit_trace_and_freeze(extract: Extract) -> None:
    model = blocks().eval()
    extractor = extract(model, BLOCKS)
    check(torch.jit.trace(extractor, X, strict=False), model, BLOCKS)
    check(torch.jit.freeze(torch.jit.script(extractor)), model, BLOCKS)


# --- ONNX ---


def from_onnx(file: str) -> Callable[[torch.Tensor], Values]:
    """What runs a file with onnxruntime: the values by the names of its outputs, in its order."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (argument,) = session.get_inputs()

    def run(x: torch.Tensor) -> Values:
        values = session.run(None, {argument.name: x.numpy()})
        return dict(zip(names, map(torch.from_numpy, values)))

    return run


@parametrize("name", ["blocks", "resnet18", "vit"])
def test_onnx(extract: Extract, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, paths, x = case_of(name)
    file = str(tmp_path / "extractor.onnx")
    torch.onnx.export(
        extract(model.eval(), paths),
        (x,),
        file,
        input_names=["x"],
        output_names=list(paths.values()),
        dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
        verbose=False,
    )
    run = from_onnx(file)
    for batch in (x, x[:3]):
        actual = run(batch)
        assert list(actual) == list(paths.values())
        # onnxruntime folds batch norm into convolutions and adds in another order: some 1e-6 of values around 1.
        assert_close(actual, eager(model, paths, batch), rtol=1e-4, atol=1e-5)


# --- exporters: who keeps the keys ---

KEYS = {"1": "z", "0": "a.deep"}  # the second block is asked for first
IN_ORDER = ["a.deep", "z"]


def test_export_gives_a_dict_that_cannot_be_changed() -> None:
    model = blocks()
    extractor = helpers.extract(model, KEYS)
    values = check(torch.export.export(extractor, (X,)).module(), model, KEYS)
    assert list(values) == IN_ORDER
    with pytest.raises(TypeError, match="does not support mutation"):
        values["more"] = X
    dict(values)["more"] = X
    of_strict = check(torch.export.export(extractor, (X,), strict=True).module(), model, KEYS)
    of_strict["more"] = X


def to_onnx(extractor: nn.Module, folder: Path, **options: Any) -> str:
    pytest.importorskip("onnxruntime")
    file = str(folder / "extractor.onnx")
    torch.onnx.export(extractor.eval(), (X,), file, dynamo=True, verbose=False, **options)
    return file


def check_onnx(file: str) -> Any:
    """The file's graph, if ONNX's own checker finds nothing wrong."""
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(file, full_check=True)
    return onnx.load(file).graph


@parametrize(
    ("names", "given"),
    [
        (None, ["add", "add_1"]),
        (IN_ORDER, IN_ORDER),
        (["z", "a.deep"], ["z", "a.deep"]),  # the order of the queries: each name is on the other value
        (["a.deep"], ["a.deep", "add_1"]),
        ([*IN_ORDER, "more"], IN_ORDER),
    ],
    ids=str,
)
def test_onnx_names_go_by_position(names: list[str] | None, given: list[str], tmp_path: Path) -> None:
    model = blocks()
    extractor = helpers.extract(model, KEYS)
    assert list(extractor(X)) == IN_ORDER
    file = to_onnx(extractor, tmp_path, output_names=names)
    check_onnx(file)
    actual = from_onnx(file)(X)
    low, high = eager(model, KEYS, X).values()
    assert list(actual) == given
    assert_close(list(actual.values()), [low, high])
    assert differ(low, high)


@parametrize("options", [{"output_names": ["add"]}, {"output_names": ["x"], "input_names": ["x"]}], ids=str)
def test_onnx_refuses_a_key_that_is_a_name_inside(options: dict[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file = to_onnx(helpers.extract(blocks(), "1"), tmp_path, **options)
    with pytest.raises(onnx.checker.ValidationError, match="single static assignment"):
        check_onnx(file)


@parametrize(("options", "name"), [({}, "input_orig"), ({"input_names": ["rows"]}, "rows")], ids=str)
def test_onnx_renames_an_input_that_is_returned(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    model = blocks()
    extractor = helpers.extract(model, ["input", "0"])
    file = to_onnx(extractor, tmp_path, output_names=list(extractor(X)), **options)
    assert [argument.name for argument in check_onnx(file).input] == [name]
    assert_close(from_onnx(file)(X), {"input": X, **eager(model, {"0": "0"}, X)})


@parametrize("exact", [False, True])
def test_onnx_of_a_batch_norm_before_relu_in_place(exact: bool, tmp_path: Path) -> None:
    model = Sequential(linear(), nn.BatchNorm1d(4), nn.ReLU(inplace=True), linear()).eval()
    paths = {"1": "norm", "2": "relu"}
    extractor = helpers.extract_quietly(model, paths, exact=exact)
    actual = from_onnx(to_onnx(extractor, tmp_path, output_names=list(extractor(X))))(X)
    norm, relu = eager(model, paths, X).values()
    assert not torch.allclose(norm, relu)
    assert_close(actual, {"norm": norm if exact else relu, "relu": relu})


def by_openvino(converted: Any) -> Values:
    """In single precision, which is not OpenVINO's choice on every processor."""
    openvino = pytest.importorskip("openvino")
    values = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(X.numpy())
    return {output.any_name: torch.from_numpy(value) for output, value in values.items()}


def test_openvino_keeps_the_keys_of_a_module() -> None:
    openvino = pytest.importorskip("openvino")
    model = blocks()
    extractor = helpers.extract(model, KEYS)
    actual = by_openvino(openvino.convert_model(extractor, example_input=X))
    assert list(actual) == IN_ORDER
    assert_close(actual, eager(model, KEYS, X))


def test_openvino_leaves_what_it_converts_in_eval_mode() -> None:
    openvino = pytest.importorskip("openvino")
    model = blocks()
    extractor = helpers.extract(model, KEYS)
    leaf = model.get_submodule("0.first")
    openvino.convert_model(copy.deepcopy(extractor), example_input=X)
    assert extractor.training
    assert leaf.training
    openvino.convert_model(extractor, example_input=X)
    assert not extractor.training
    assert not leaf.training, "a leaf is the model's, too"
    assert model.training


def test_openvino_names_two_keys_of_one_value_alike() -> None:
    openvino = pytest.importorskip("openvino")
    extractor = helpers.extract(blocks(), {"0": "a", "0.add": "b"})
    converted = openvino.convert_model(extractor, example_input=X)
    assert [output.get_names() for output in converted.outputs] == [{"b"}, {"b"}]


def test_openvino_loses_the_keys_of_a_program() -> None:
    openvino = pytest.importorskip("openvino")
    model = blocks()
    program = torch.export.export(helpers.extract(model, KEYS), (X,))
    actual = by_openvino(openvino.convert_model(program))
    assert list(actual) == ["add:0", "add_1:0"]
    assert_close(list(actual.values()), list(eager(model, KEYS, X).values()))


# --- files ---

# The model itself is loaded last: it needs its code, which shows that the check before can fail.
LOAD = """
import sys, torch, {featx}
torch.set_num_threads(1)
extractor, x = torch.load("extractor.pt", weights_only=False), torch.load("x.pt")
values = []
for mode in (True, False):
    extractor.train(mode)
    torch.manual_seed(1)
    values.append(extractor(x))
assert not {{"torchvision", "tests", "pytest"}} & set(sys.modules), "the extractor needed the model's code"
torch.save(values, "values.pt")
torch.load("model.pt", weights_only=False)
print(*sorted({{"torchvision", "tests"}} & set(sys.modules)))
"""


@parametrize(("name", "needs"), [("resnet18", "torchvision"), ("Branches", "tests")])
def test_a_fresh_process_needs_no_code_of_the_model(extract: Extract, name: str, needs: str, tmp_path: Path) -> None:
    model, paths, x = case_of(name)
    for saved, file in ((extract(model, paths), "extractor.pt"), (model, "model.pt"), (x, "x.pt")):
        torch.save(saved, tmp_path / file)
    path = os.pathsep.join([str(Path(featx.__file__).parent), str(ROOT)])
    program = LOAD.format(featx=featx.__name__)
    done = python("-c", program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [needs]
    expected = [eager(model.train(mode), paths, x) for mode in (True, False)]
    assert same(torch.load(tmp_path / "values.pt"), expected)
    assert differ(*expected)


def test_safetensors(extract: Extract, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Branches()
    file = tmp_path / "extractor.safetensors"
    seeded(model.train(), X)  # statistics that are not those of a new model
    safetensors.save_file(extract(model, MODES).state_dict(), file)
    extractor = extract(Branches(), MODES)
    assert differ(seeded(extractor.eval(), X), eager(model.eval(), MODES, X))
    extractor.load_state_dict(safetensors.load_file(file))
    check_flips(lambda: seeded(extractor, X), lambda: eager(model, MODES, X), extractor, model)


def tied() -> nn.Module:
    model = Sequential(Block(), Block(), linear())
    model[1].first.weight = model[0].first.weight
    return model


def test_safetensors_of_tied_weights(extract: Extract, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = tied()
    file = str(tmp_path / "extractor.safetensors")
    safetensors.save_model(extract(model, BLOCKS), file)
    assert len({"0.first.weight", "1.first.weight"} & set(safetensors.load_file(file))) == 1
    extractor = extract(tied(), BLOCKS)
    assert differ(extractor(X), eager(model, BLOCKS, X))
    assert safetensors.load_model(extractor, file) == (set(), [])
    check(extractor, model, BLOCKS)
    assert extractor.get_parameter("0.first.weight") is extractor.get_parameter("1.first.weight")


@parametrize("assign", [False, True])
@parametrize("name", ZOO)
def test_the_models_state_dict(extract: Extract, name: str, assign: bool) -> None:
    model = build(name).eval()
    paths = itself(ZOO[name])
    extractor = extract(build(name).eval(), paths)
    expected = eager(model, paths, IMAGES)
    assert differ(extractor(IMAGES), expected)
    state = model.state_dict()
    result = extractor.load_state_dict(state, strict=False, assign=assign)
    assert not result.missing_keys
    # What was cut away: the modules whose parameters have no part in the features.
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss_of(expected), parameters, allow_unused=True)
    unused = {name.rpartition(".")[0] for name, gradient in zip(names, found) if gradient is None}
    assert sorted(result.unexpected_keys) == sorted(key for key in state if key.rpartition(".")[0] in unused)
    assert unused
    check(extractor, model, paths, IMAGES)
    first = next(iter(extractor.state_dict()))
    assert (extractor.state_dict()[first].data_ptr() == state[first].data_ptr()) is assign


def itself(paths: Iterable[str]) -> dict[str, str]:
    return {path: path for path in paths}


# --- several processes ---


def in_two_processes(worker: Callable[[int], Any], folder: Path) -> list[Any]:
    torch.multiprocessing.spawn(_rank, args=(worker, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(rank: int, worker: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(worker(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def images_of(rank: int, step: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet18")


def ddp_steps(rank: int, *, extract: Extract) -> list[Values]:
    extractor = extract(resnet(), RESNET)
    wrapped = nn.parallel.DistributedDataParallel(extractor, find_unused_parameters=False)
    steps = []
    for step in range(2):
        wrapped.zero_grad()
        loss_of(wrapped(images_of(rank, step))).backward()
        steps.append({name: parameter.grad.clone() for name, parameter in extractor.named_parameters()})
    return steps


def test_ddp_uses_every_parameter(extract: Extract, tmp_path: Path) -> None:
    """DDP raises in the second step if a parameter was without a gradient in the first."""
    first, second = in_two_processes(functools.partial(ddp_steps, extract=extract), tmp_path)
    assert same(first, second)
    model = resnet()
    names = [name for name, _ in model.named_parameters() if not name.startswith(("layer3", "layer4", "fc"))]
    for step in range(2):
        losses = [loss_of(eager(model, RESNET, images_of(rank, step), clone=False)) for rank in range(2)]
        assert same(first[step], mean_gradients(model, names, losses))


def mean_gradients(model: nn.Module, names: list[str], losses: list[torch.Tensor]) -> Values:
    """Halves are exact, so the order of dividing and adding does not show."""
    parameters = [model.get_parameter(name) for name in names]
    first, second = (torch.autograd.grad(loss, parameters) for loss in losses)
    return {name: (a + b) / 2 for name, a, b in zip(names, first, second)}


def ddp_without_an_extractor(rank: int) -> str:
    whole = net(lambda self, x: eager(self.model, RESNET, x), model=resnet())
    wrapped = nn.parallel.DistributedDataParallel(whole, find_unused_parameters=False)
    loss_of(wrapped(images_of(rank, 0))).backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration") as caught:
        wrapped(images_of(rank, 1))
    return str(caught.value)


def test_ddp_of_the_whole_model_raises(tmp_path: Path) -> None:
    messages = in_two_processes(ddp_without_an_extractor, tmp_path)
    assert [len(re.findall("parameters that were not used", message)) for message in messages] == [1, 1]


def fsdp_steps(rank: int, *, extract: Extract) -> list[Any]:
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = blocks()
    extractor = extract(model, BLOCKS)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for path in ("0.first", "1.second"):
        fully_shard(extractor.get_submodule(path), mesh=mesh)
    fully_shard(extractor, mesh=mesh)
    steps = []
    for step in range(2):
        extractor.zero_grad()
        values = extractor(X[rank::2] + step)
        loss_of(values).backward()
        parameters = dict(extractor.named_parameters())
        assert all(isinstance(p.grad, DTensor) for p in parameters.values()), "a parameter is not sharded"
        assert parameters["0.first.weight"].to_local().shape == (2, 4)
        steps.append((values, {name: parameter.grad.full_tensor() for name, parameter in parameters.items()}))
    return steps


def test_fsdp(extract: Extract, tmp_path: Path) -> None:
    by_rank = in_two_processes(functools.partial(fsdp_steps, extract=extract), tmp_path)
    torch.manual_seed(0)
    model = blocks()
    names = [name for name, _ in model.named_parameters() if not name.startswith("2.")]
    for step in range(2):
        expected = [eager(model, BLOCKS, X[rank::2] + step, clone=False) for rank in range(2)]
        mean = mean_gradients(model, names, [loss_of(values) for values in expected])
        for rank in range(2):
            assert same(by_rank[rank][step], (expected[rank], mean))


# --- torch.func ---


def test_functional_call(extract: Extract) -> None:
    model = Branches()
    other = Branches()
    extractor = extract(model, MODES)
    state = {name: other.state_dict()[name] for name in extractor.state_dict()}
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        extractor.train(mode)
        expected = eager(copy.deepcopy(other.train(mode)), MODES, X)
        assert same(seeded(lambda x: functional_call(extractor, state, (x,)), X), expected), mode
        assert same(dict(model.state_dict()), dict(before)), "the extractor's own state was used"


def stacked(each: list[Values]) -> Values:
    return {key: torch.stack([values[key] for values in each]) for key in each[0]}


def test_vmap_over_inputs(extract: Extract) -> None:
    model = Branches().eval()
    groups = torch.stack([X, X * 2, X - 1])
    actual = vmap(extract(model, MODES))(groups)
    # One product of larger matrices in place of three.
    assert_close(actual, stacked([eager(model, MODES, group) for group in groups]))


def test_func_grad(extract: Extract) -> None:
    model = Branches().eval()
    extractor = extract(model, MODES)
    parameters = {name: parameter.detach() for name, parameter in extractor.named_parameters()}

    def loss(parameters: Values, x: torch.Tensor) -> torch.Tensor:
        return loss_of(functional_call(extractor, parameters, (x,)))

    actual = torch.func.grad(loss)(parameters, X)
    assert same(actual, gradients(eager(model, MODES, X, clone=False), extractor))
    for_each = vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X[:, None])
    assert_close(for_each, stacked([gradients(eager(model, MODES, x[None]), extractor) for x in X]))


def test_an_ensemble(extract: Extract) -> None:
    """The names of an extractor's parameters are the model's, so what is stacked of models fits."""
    models = [Branches().eval() for _ in range(3)]
    extractor = extract(copy.deepcopy(models[0]).to("meta"), MODES)
    parameters, buffers = torch.func.stack_module_state(models)
    state = {**parameters, **buffers}
    kept = {name: state[name] for name in extractor.state_dict()}
    actual = vmap(lambda state: functional_call(extractor, state, (X,)))(kept)
    assert_close(actual, stacked([eager(model, MODES, X) for model in models]))


# --- numbers and memory ---


@in_both_modes
@parametrize("name", [*ZOO, "vit"])
def test_autocast(extract: Extract, name: str, mode: bool) -> None:
    model, paths, x = case_of(name)
    if name == "vit":
        paths["encoder.layers"] = "last"
    else:
        paths = itself(ZOO[name])
    extractor = extract(model.train(mode), paths)
    with torch.autocast("cpu", torch.bfloat16):
        actual = check(extractor, model, paths, x)
    assert torch.bfloat16 in {value.dtype for value in actual.values()}
    assert not same(actual, seeded(extractor, x))


@in_both_modes
def test_channels_last(extract: Extract, mode: bool) -> None:
    model = build("resnet18").train(mode).to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    for value in check(extract(model, RESNET), model, RESNET, images).values():
        assert value.is_contiguous(memory_format=torch.channels_last)
        assert not value.is_contiguous()


@in_both_modes
@parametrize("name", ZOO)
def test_gradients(extract: Extract, name: str, mode: bool) -> None:
    model = build(name).train(mode)
    paths = itself(ZOO[name])
    extractor = extract(model, paths)
    actual = gradients(seeded(extractor, IMAGES), extractor)
    assert same(actual, gradients(eager(model, paths, IMAGES, clone=False), extractor))
    assert all(gradient.any() for gradient in actual.values())


# --- changes to modules ---


# torch's own default observers still use what they warn of.
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
def test_quantization_by_graph(extract: Extract) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    early = Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = Sequential(early, nn.Flatten(), nn.LazyLinear(2)).eval()
    model(IMAGES)
    extractor = extract(model, {"0": "early"})
    expected = eager(model, {"0": "early"}, IMAGES)

    def quantized(module: nn.Module) -> nn.Module:
        prepared = prepare_fx(copy.deepcopy(module), get_default_qconfig_mapping(), (IMAGES,))
        prepared(IMAGES)
        return convert_fx(prepared)

    converted = quantized(extractor)
    actual = converted(IMAGES)
    assert same(actual, {"early": quantized(early)(IMAGES)})
    assert "quantized" in type(converted.get_submodule("0.0")).__module__
    assert_close(actual, expected, rtol=0, atol=0.05)
    assert differ(actual, expected)


def with_weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(2)


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "parametrize": lambda module: register_parametrization(module, "weight", Symmetric()),
    "weight_norm": with_weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "prune_for_good": lambda module: prune.remove(prune.l1_unstructured(module, "weight", amount=0.5), "weight"),
}


@parametrize("first", ["extract", "change"])
@parametrize("change", CHANGES)
def test_changed_weights(extract: Extract, change: str, first: str) -> None:
    model = blocks()
    before = eager(model, BLOCKS, X)
    if first == "change":
        CHANGES[change](model.get_submodule("0.first"))
    extractor = extract(model, BLOCKS)
    if first == "extract":
        CHANGES[change](extractor.get_submodule("0.first"))
    actual = check(extractor, model, BLOCKS)
    assert differ(actual, before)
    assert same(gradients(actual, extractor), gradients(eager(model, BLOCKS, X, clone=False), extractor))
    assert set(extractor.state_dict()) == {name for name in model.state_dict() if not name.startswith("2.")}


# --- what is shared with the model ---


def test_torchao_quantizes_the_model_too() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = blocks()
    before = eager(model, BLOCKS, X)
    extractor = helpers.extract(model, BLOCKS)
    apart = copy.deepcopy(extractor)
    quantization.quantize_(extractor, quantization.Int8WeightOnlyConfig())
    assert differ(check(extractor, model, BLOCKS), before)
    assert same(apart(X), before)


def test_accelerate_offloads_what_a_container_holds_and_does_not_bring_it_back() -> None:
    accelerate = pytest.importorskip("accelerate")
    # Attention reads the weights of a part without calling it, which accelerate has to be told of.
    options = {"execution_device": "cpu", "preload_module_classes": ["MultiheadAttention"]}
    model, paths, x = case_of("vit")
    expected = eager(model, paths, x)
    position = model.encoder.pos_embedding.detach().clone()
    extractor = helpers.extract(model, paths)
    assert same(eager(accelerate.cpu_offload(copy.deepcopy(model), **options), paths, x), expected)
    accelerate.cpu_offload(extractor, **options)
    assert model.encoder.layers.encoder_layer_0.mlp[0].weight.is_meta, "a leaf is the model's, too"
    with pytest.raises(RuntimeError, match="meta"):
        extractor(x)
    accelerate.utils.set_module_tensor_to_device(extractor, "encoder.pos_embedding", "cpu", position)
    assert same(extractor(x), expected)


@parametrize("leaf", [False, True])
def test_peft_merges_an_adapter_that_is_traced_as_well(leaf: bool) -> None:
    peft = pytest.importorskip("peft")
    model = blocks()
    twice = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["first"], init_lora_weights=False)).eval()
    expected = eager(model, BLOCKS, X)
    layers = {"tracer_kwargs": {"leaf_modules": [peft.tuners.lora.Linear]}}
    extractor = helpers.extract(model, BLOCKS, **(layers if leaf else {"example_inputs": (X,)}))
    assert same(extractor(X), expected)
    with torch.no_grad():
        for path in ("0.first", "1.first"):
            twice.get_submodule(path).weight += 2 * model.get_submodule(path).get_delta_weight("default")
    adapted.merge_adapter()
    assert_close(eager(model, BLOCKS, X), expected)
    assert_close(extractor(X), expected if leaf else eager(twice, BLOCKS, X))
    assert not torch.allclose(expected["low"], eager(twice, BLOCKS, X)["low"])


def test_captum_asks_leaves_and_one_tensor() -> None:
    captum = pytest.importorskip("captum.attr")
    model, paths, x = case_of("resnet18")
    extractor = helpers.extract(model.eval(), paths)
    leaf = extractor.get_submodule("layer2.1.conv2")
    (expected,) = eager(model, {"layer2.1.conv2": "conv2"}, x).values()
    assert equal(captum.LayerActivation(extractor, leaf).attribute(x), expected)
    with pytest.raises(AssertionError, match="did not obtain any outputs"):
        captum.LayerActivation(extractor, extractor.get_submodule("layer1")).attribute(x)

    def cam(forward: Callable[..., Any]) -> torch.Tensor:
        return captum.LayerGradCam(forward, leaf).attribute(x, target=(0, 0, 0))

    with pytest.raises(AttributeError, match="'dict' object has no attribute 'shape'"):
        cam(extractor)
    by_hand = Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2)
    actual = cam(lambda x: extractor(x)["high"])
    assert same(actual, cam(by_hand))
    assert actual.any()


# --- modules around and inside ---


@in_both_modes
@parametrize("use_reentrant", [True, False])
def test_checkpoint(extract: Extract, mode: bool, use_reentrant: bool) -> None:
    model = Branches().train(mode)
    extractor = extract(model, MODES)
    x = X.clone().requires_grad_()
    twin = X.clone().requires_grad_()
    calls: list[int] = []

    def forward(x: torch.Tensor) -> Any:
        calls.append(1)
        return tuple(extractor(x).values())

    # The reentrant kind looks for tensors in tuples only, so the dict is made outside.
    values = seeded(lambda x: checkpoint(forward, x, use_reentrant=use_reentrant), x)
    actual = dict(zip(MODES.values(), values))
    expected = eager(model, MODES, twin, clone=False)
    assert same(actual, expected)
    for parameter in extractor.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss_of(actual).backward()
    got = {name: parameter.grad.clone() for name, parameter in extractor.named_parameters()}
    assert len(calls) == 2, "nothing was computed again"
    assert same(got, gradients(eager(model, MODES, X, clone=False), extractor))
    loss_of(expected).backward()
    assert equal(x.grad, twin.grad)


def flops(call: Callable[..., Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call(IMAGES)
    return counter.get_total_flops()


def test_flops_of_an_early_block(extract: Extract) -> None:
    model = build("resnet18").eval()
    extractor = extract(model, "layer1")
    by_hand = Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
    assert 0 < flops(extractor) == flops(by_hand) < flops(model)


TOOLS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "symbolic_trace": fx.symbolic_trace,
    "interpreter": lambda extractor: fx.Interpreter(extractor).run,
    "transformer": lambda extractor: fx.Transformer(extractor).transform(),
}


@in_both_modes
@parametrize("tool", TOOLS)
def test_tools_of_fx(extract: Extract, tool: str, mode: bool) -> None:
    model = Branches().train(mode)
    check(TOOLS[tool](extract(model, MODES)), model)


def test_fusion_by_fx(extract: Extract) -> None:
    from torch.fx.experimental.optimization import fuse

    early = Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = Sequential(early, nn.Flatten(), nn.Linear(8 * 30 * 30, 2))
    model(IMAGES)
    model.eval()
    fused = fuse(extract(model, {"0": "early"}))
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    # Batch norm is multiplied into the weights, which rounds elsewhere.
    assert_close(fused(IMAGES), eager(model, {"0": "early"}, IMAGES))


def shapes(values: Values) -> dict[str, Any]:
    return {key: value.shape for key, value in values.items()}


def test_shapes_without_values(extract: Extract) -> None:
    model = build("resnet18")
    extractor = extract(model, RESNET)
    expected = shapes(eager(model, RESNET, IMAGES))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = extractor(mode.from_tensor(IMAGES))
    on_meta = copy.deepcopy(extractor).to("meta")(IMAGES.to("meta"))
    assert shapes(faked) == shapes(on_meta) == expected


def test_averaged_weights(extract: Extract) -> None:
    model = Branches().eval()
    other = Branches().eval()
    extractor = extract(copy.deepcopy(model), MODES)
    averaged = AveragedModel(extractor)
    averaged.update_parameters(extractor)
    averaged.update_parameters(extract(other, MODES))
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.lerp_(theirs, 0.5)
    assert_close(averaged(X), eager(model, MODES, X))
    assert differ(averaged(X), eager(other, MODES, X))


@parametrize("name", ["Branches", "vit"])
def test_an_extractor_of_an_extractor(extract: Extract, name: str) -> None:
    model, outer, x = case_of(name)
    inner = dict([list(outer.items())[name == "Branches"]])  # in Branches the modes part after the first
    twice = extract(extract(model, outer), inner)
    assert set(twice.state_dict()) == set(extract(model, inner).state_dict())
    for mode in (True, False, True):
        check(twice.train(mode), model.train(mode), inner, x)


def test_hooks_of_submodules_fire(extract: Extract) -> None:
    model = blocks()
    extractor = extract(model, BLOCKS)
    fired: list[str] = []
    for path in ("0.first", "1.second"):
        module = extractor.get_submodule(path)
        module.register_forward_pre_hook(lambda *_, path=path: fired.append(f"{path} before"))
        module.register_forward_hook(lambda module, inputs, output: output * 2)
        module.register_full_backward_hook(lambda *_, path=path: fired.append(f"{path} backward"))
    actual = extractor(X.clone().requires_grad_())
    loss_of(actual).backward()
    assert fired == ["0.first before", "1.second before", "1.second backward", "0.first backward"]
    assert same(actual, eager(model, BLOCKS, X)), "the modules and their hooks are the model's"
    assert differ(actual, eager(copy_of_values(model), BLOCKS, X)), "the hooks changed nothing"


def test_containers_are_not_called(extract: Extract) -> None:
    """As in any fx.GraphModule: what is inlined is run by the graph, and its hooks see nothing."""
    for module, calls in ((blocks(), 1), (fx.symbolic_trace(blocks()), 0), (extract(blocks(), BLOCKS), 0)):
        fired: list[str] = []
        for path in ("0", "0.first"):
            module.get_submodule(path).register_forward_hook(lambda *_, path=path, fired=fired: fired.append(path))
        module(X)
        assert fired == ["0.first"] + ["0"] * calls


def copy_of_values(model: nn.Module) -> nn.Module:
    new = blocks()
    new.load_state_dict(model.state_dict())
    return new


# --- what torch cannot do ---


class Tries(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return x + 1
        finally:
            pass


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x[:4]).abs()


def holding(part: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Sequential(Sequential(linear(), part), nn.Linear(4, 2))


class Limit(NamedTuple):
    """What is tried with a model and a file, on a model whose part ``0`` is what the extractor keeps."""

    attempt: Callable[[nn.Module, Path], Any]
    model: Callable[[], nn.Module]
    error: type[BaseException]
    message: str
    reason: str


def _weights_only(module: nn.Module, file: Path) -> None:
    torch.save(module, file)
    torch.load(file)


def _to_onnx(module: nn.Module, file: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.onnx.export(module.eval(), (X,), str(file), verbose=False)


def _save_tied(module: nn.Module, file: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    safetensors.save_file(module.state_dict(), file)


def as_graph(module: nn.Module) -> nn.Module:
    return module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)


def _stack(module: nn.Module, file: Path) -> None:
    graph = as_graph(module)
    torch.func.stack_module_state([graph, copy.deepcopy(graph)])


def _shard_a_container(module: nn.Module, file: Path) -> None:
    graph = as_graph(module)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for part in (graph.get_submodule("0"), graph):
            fully_shard(part, mesh=mesh)
        graph(X)
    finally:
        torch.distributed.destroy_process_group()


def _pruned_then_copied(module: nn.Module, file: Path) -> None:
    prune.l1_unstructured(module.get_submodule("0.0"), "weight", amount=0.5)
    copy.deepcopy(module)


def _parametrized_then_pickled(module: nn.Module, file: Path) -> None:
    parametrizations.weight_norm(module.get_submodule("0.0"))
    pickle.dumps(module)


LIMITS: dict[str, Limit] = {
    "script_try": Limit(
        lambda module, file: torch.jit.script(module),
        holding(Tries()),
        torch.jit.frontend.UnsupportedNodeError,
        "try blocks aren't supported",
        "TorchScript knows no try, and a leaf is compiled as it is written",
    ),
    "trace_dict": Limit(
        lambda module, file: torch.jit.trace(net(lambda self, x: {"key": self.module(x)}, module=module), X),
        holding(nn.Identity()),
        RuntimeError,
        "Encountering a dict at the output of the tracer",
        "torch.jit.trace takes a dict for a sign of a changing structure; strict=False allows it",
    ),
    "export_branch": Limit(
        lambda module, file: torch.export.export(module, (X,)),
        holding(Decides()),
        RuntimeError,
        "data-dependent",
        "one graph cannot hold a branch on values",
    ),
    "compile_branch": Limit(
        lambda module, file: torch.compile(module, backend="eager", fullgraph=True)(X),
        holding(Decides()),
        torch._dynamo.exc.Unsupported,
        "Data-dependent branching",
        "the same for fullgraph=True",
    ),
    "export_then_flip": Limit(
        lambda module, file: torch.export.export(module, (X,)).module().eval(),
        holding(nn.Dropout()),
        NotImplementedError,
        "eval\\(\\) is not supported",
        "a program has the mode that it was exported in",
    ),
    "vmap_batch_norm": Limit(
        lambda module, file: vmap(module.train())(torch.stack([X, X])),
        holding(nn.BatchNorm1d(4)),
        RuntimeError,
        "Batch norm got a batched tensor as input while the running_mean",
        "vmap cannot write one running mean for many batches",
    ),
    "vmap_dropout": Limit(
        lambda module, file: vmap(module.train())(torch.stack([X, X])),
        holding(nn.Dropout()),
        RuntimeError,
        "called random operation while in randomness error mode",
        "vmap must be told whether random numbers are shared",
    ),
    "stack_graph_modules": Limit(
        _stack,
        holding(nn.Identity()),
        RuntimeError,
        "Expected all models to be of the same class",
        "each GraphModule has a class of its own, for its own forward; stacking the models themselves works",
    ),
    "fsdp_container": Limit(
        _shard_a_container,
        holding(nn.Identity()),
        RuntimeError,
        "got mixed torch.Tensor and DTensor",
        "fully_shard gathers weights when a module is called, and a GraphModule calls leaves only: shard those",
    ),
    "onnx_eigenvalues": Limit(
        _to_onnx,
        holding(Eigenvalues()),
        torch.onnx.errors.OnnxExporterError,
        "Failed to convert the exported program to an ONNX model",
        "ONNX has no such operation",
    ),
    "load_weights_only": Limit(
        _weights_only,
        holding(nn.Identity()),
        pickle.UnpicklingError,
        "Weights only load failed",
        "weights_only=True, the default of torch.load, is for tensors and takes no module of any class",
    ),
    "safetensors_tied": Limit(
        _save_tied,
        tied,
        RuntimeError,
        "Some tensors share memory",
        "save_file writes each tensor once under one name; save_model is for tied weights",
    ),
    "deepcopy_pruned": Limit(
        _pruned_then_copied,
        holding(nn.Identity()),
        RuntimeError,
        "Only Tensors created explicitly by the user",
        "pruning leaves a computed tensor, with its gradient graph, as an attribute",
    ),
    "pickle_parametrized": Limit(
        _parametrized_then_pickled,
        holding(nn.Identity()),
        RuntimeError,
        "Serialization of parametrized modules is only supported through state_dict",
        "parametrized modules have classes made on the fly",
    ),
}


@parametrize("on", ["model", "extractor"])
@parametrize("name", LIMITS)
def test_what_torch_cannot_do(extract: Extract, name: str, on: str, tmp_path: Path) -> None:
    limit = LIMITS[name]
    module = limit.model()
    if on == "extractor":
        query = "1" if limit.model is tied else "0"
        module = extract(module, query, tracer_kwargs={"leaf_modules": [Tries, Decides]})
    seeded(module, X)  # the module is all right
    torch.compiler.reset()
    with pytest.raises(limit.error, match=limit.message):
        limit.attempt(module, tmp_path / "file")
