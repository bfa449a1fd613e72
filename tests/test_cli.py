"""The command line: most of it in this process, what is about processes through real ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
import torch

from tests import featx

ROOT = Path(__file__).parent.parent
PHOTOGRAPH = str(ROOT / "tests" / "data" / "grace_hopper.jpg")
NOTE = "featx: note: the weights are random, unless the callable loads some\n"
RESNET, GOOGLENET, VIT = (f"torchvision.models:{name}" for name in ("resnet18", "googlenet", "vit_b_32"))
SMALL = ["--kwargs", '{"init_weights": false}', "--input", "2,3,64,64"]  # for googlenet

MYMOD = """
import builtins, os, signal, warnings
import torch
from torch import nn

class Constant(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0, 2.0])

class Nested(nn.Module):
    def forward(self, x):
        return {"size": x.shape[0], "none": [], "nan": x / 0 * 0, "sparse": x.to_sparse(), "plain": (x, 3)}

class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)

class Makers:
    build = staticmethod(lambda: build())

def build():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

def branching():
    return nn.Sequential(nn.Linear(4, 4), Branching())

def noisy():
    print("hello")
    warnings.warn("two\\nlines")
    return build()

def fails(kind, *, text=()):
    raise getattr(builtins, kind)(*text)

def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is, with a module and a few files."""
    (tmp_path / "mymod.py").write_text(MYMOD)
    (tmp_path / "cut.jpg").write_bytes(Path(PHOTOGRAPH).read_bytes()[:20_000])
    for number, content in enumerate(["", "[]", '{"train": []}', "\x00"]):
        (tmp_path / f"no_names_{number}.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


Call = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: the exit code, and what was printed."""

    def result(*arguments: str) -> Tuple[int, str, str]:
        skip_without_torchvision(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            try:
                code = featx._main(arguments)
            except SystemExit as stopped:
                code = stopped.code
        return (code, *capsys.readouterr())

    return result


def skip_without_torchvision(*arguments: str) -> None:
    if any(argument.startswith("torchvision") for argument in arguments):
        pytest.importorskip("torchvision")


def process(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    skip_without_torchvision(*command)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


def table(printed: Tuple[int, str, str], said: str = "") -> List[List[str]]:
    code, out, err = printed
    assert (code, err) == (0, said)
    return [line.split() for line in out.splitlines()]


# --- names ---


def test_table_of_nodes(call: Call) -> None:
    rows = table(call("mymod:Makers.build"))
    assert rows == [
        ["name", "operation", "target", "shape", "note"],
        ["input", "placeholder", "input"],
        ["0", "call_module", "Linear"],
        ["1", "call_module", "ReLU"],
    ]
    rows = table(call("mymod:Constant", "--input", "3,2"))
    assert rows[-1] == ["mul", "call_function", "operator.mul", "3x2"]
    rows = table(call("mymod:Nested", "--input", "3,2"))
    assert ["x", "placeholder", "x", "3x2"] in rows
    assert [row[0] for row in rows if len(row) == 3] == ["getattr", "getitem"]  # which are no tensors


def test_table_of_each_mode(call: Call) -> None:
    zoo = pytest.importorskip("torchvision.models")
    names = featx.get_graph_node_names(zoo.googlenet(init_weights=False), suppress_diff_warning=True)
    rows = table(call(GOOGLENET, *SMALL))
    assert [row[0] for row in rows[1:]] == names.eval
    assert "2x64x32x32" in rows[2]
    rows = table(call(GOOGLENET, "--train", *SMALL))
    assert [row[0] for row in rows[1:]] == names.train
    noted = {row[0] for row in rows if row[4:6] == ["train", "only"] or row[4:6] == ["train", "only;"]}
    assert {name for name in names.train if name.startswith("aux")} <= noted <= set(names.train) - set(names.eval)


@pytest.mark.parametrize(
    ("model", "name", "note"),
    [
        (RESNET, "layer1.0.bn1", "is overwritten in place by the module 'layer1.0.relu'"),
        (
            VIT,
            "encoder.layers.encoder_layer_0.ln_1",
            "is the value of the module 'encoder.layers.encoder_layer_0.ln_2'",
        ),
    ],
)
def test_notes(call: Call, model: str, name: str, note: str) -> None:
    (line,) = (line for line in call(model)[1].splitlines() if line.startswith(f"{name} "))
    assert note in line
    assert not re.search(" is (overwritten|the value)", call(model, "--exact")[1])


def test_check_and_json(call: Call, folder: Path) -> None:
    zoo = pytest.importorskip("torchvision.models")
    code, out, err = call(RESNET, "--json")
    names = featx.get_graph_node_names(zoo.resnet18())
    assert (code, err) == (0, "")
    assert json.loads(out) == {"model": RESNET, "exact": False, "train": names.train, "eval": names.eval}
    (folder / "names.json").write_text(out)
    assert call(RESNET, "--check", "names.json") == (0, "all names are those of names.json\n", "")
    code, out, err = call("torchvision.models:resnet34", "--check", "names.json")
    lines = out.splitlines()
    assert (code, err) == (1, "")
    assert lines[:2] == ["--- train: names.json", "+++ train: torchvision.models:resnet34"]
    assert {"--- eval: names.json", "+layer1.2.conv1"} <= set(lines)
    assert not [line for line in lines if line.startswith("-") and not line.startswith("---")]
    (folder / "exact.json").write_text(call(VIT, "--json", "--exact")[1])
    assert call(VIT, "--check", "exact.json")[0] == 0  # the file says how it was written


def test_check_gives_its_exit_code(call: Call, folder: Path) -> None:
    (folder / "names.json").write_text(call("mymod:build", "--json")[1])
    assert call("mymod:build", "--check", "names.json")[0] == 0
    code, out, _ = call("torch.nn:Sequential", "--check", "names.json")
    assert (code, "\n-1\n" in out) == (1, True)


# --- features ---


def test_features_of_a_photograph(call: Call) -> None:
    zoo = pytest.importorskip("torchvision.models")
    arguments = [RESNET, "--image", PHOTOGRAPH, "layer1", "layer4=deep"]
    rows = table(call(*arguments), NOTE)
    assert rows[0] == ["key", "shape", "dtype", "mean", "std", "min", "max"]
    assert [row[:3] for row in rows[1:]] == [["layer1", "1x64x56x56", "float32"], ["deep", "1x512x7x7", "float32"]]
    torch.manual_seed(0)
    model = zoo.resnet18().eval()
    with torch.no_grad():
        deep = featx.create_feature_extractor(model, ["layer4"])(featx._read_image(PHOTOGRAPH))["layer4"]
    expected = [float(value) for value in (deep.mean(), deep.std(unbiased=False), deep.min(), deep.max())]
    assert list(map(float, rows[2][3:])) == pytest.approx(expected, rel=1e-3)
    code, out, err = call(*arguments, "--json")
    assert (code, err) == (0, NOTE)
    row = json.loads(out)[1]
    assert (row["key"], row["shape"], row["dtype"]) == ("deep", [1, 512, 7, 7], "float32")
    assert [row[name] for name in ("mean", "std", "min", "max")] == pytest.approx(expected, rel=1e-5)


def test_the_photograph_is_prepared_as_torchvisions_presets_do(folder: Path) -> None:
    from PIL import Image

    presets = pytest.importorskip("torchvision.transforms._presets")
    with Image.open(PHOTOGRAPH) as file:
        theirs = presets.ImageClassification(crop_size=224)(file.convert("RGB"))
    assert torch.allclose(featx._read_image(PHOTOGRAPH), theirs[None], atol=1e-5)
    for size in ((1, 3000), (3000, 1), (1, 1), (300, 200)):
        Image.new("RGB", size, (10, 20, 30)).save("odd.png")
        assert featx._read_image("odd.png").shape == (1, 3, 224, 224)


def test_features_of_one_mode_only(call: Call) -> None:
    assert [row[0] for row in table(call(GOOGLENET, "aux1", "--train", *SMALL), NOTE)] == ["key", "aux1"]
    assert "the eval graph has no 'aux1'" in call(GOOGLENET, "aux1", *SMALL)[2]
    saved = call(GOOGLENET, "aux1", "--train", "--save", "extractor.pt", *SMALL)
    assert (saved[0], "the eval graph has no 'aux1'" in saved[2]) == (2, True)  # what is saved has both modes


def test_exact_features(call: Call) -> None:
    arguments = [RESNET, "bn1", "relu", "--input", "1,3,64,64", "--json"]
    default, exact = call(*arguments), call(*arguments, "--exact")
    assert "featx: warning: the feature 'bn1' is overwritten in place by the module 'relu'" in default[2]
    assert (len(default[2].splitlines()), exact[2]) == (2, NOTE)
    bn1, relu = json.loads(exact[1])
    assert bn1["min"] < 0 == relu["min"] == json.loads(default[1])[0]["min"]


def test_features_that_are_no_tensors(call: Call) -> None:
    rows = table(call("mymod:Nested", "output", "--input", "3,2"), NOTE)
    found = {row[0]: row[1:] for row in rows[1:]}
    assert rows[0][:3] == ["key", "value", "shape"]
    assert (found["output[0]"], found["output[4]"]) == (["3"], ["3"])
    assert found["output[1]"] == found["output[2]"] == ["3x2", "float32"]
    assert len(found["output[3]"]) == 6
    features = {row["key"]: row for row in json.loads(call("mymod:Nested", "output", "--input", "3,2", "--json")[1])}
    assert features["output[0]"] == {"key": "output[0]", "value": "3"}
    assert (features["output[2]"]["shape"], features["output[1]"]["mean"]) == ([3, 2], None)
    rows = table(call("torch.nn:Identity", "output", "--input", "3,2", "--device", "meta"), NOTE)
    assert rows[1] == ["output", "3x2", "float32"]


def test_auto_leaf(call: Call) -> None:
    for arguments in ([], ["1", "--input", "2,4"]):
        code, out, err = call("mymod:branching", "--auto-leaf", *arguments)
        assert (code, out.splitlines()[-1].split()[0]) == (0, "1")
        assert "'leaf_modules': [mymod.Branching]" in err


def test_checkpoint(call: Call, folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).requires_grad_(False)
    torch.save(model.state_dict(), "state.pt")
    loaded = call("mymod:build", "0", "--input", "2,4", "--json", "--checkpoint", "state.pt")
    torch.manual_seed(0)
    torch.nn.Linear(4, 4)  # as the command builds its own before it draws the input
    assert json.loads(loaded[1])[0]["mean"] == pytest.approx(float(model(torch.rand(2, 4)).mean()), rel=1e-4)
    assert (loaded[0], loaded[2]) == (0, "")


def test_checkpoints_that_are_none(call: Call, folder: Path) -> None:
    sys.path.insert(0, str(folder))
    import mymod

    contents = [
        (mymod.build(), "Weights only load failed"),
        (mymod.Hostile(), "Weights only load failed"),
        ({"epoch": 3, "state_dict": mymod.build().state_dict()}, "Error(s) in loading state_dict for Sequential"),
        ([1], "Expected state_dict to be dict-like"),
    ]
    for content, message in contents:
        torch.save(content, "state.pt")
        code, out, err = call("mymod:build", "--checkpoint", "state.pt")
        assert (code, out, len(err.splitlines()), message in err) == (2, "", 1, True)
    assert not (folder / "owned").exists()


def test_save(folder: Path) -> None:
    arguments = ["mymod:build", "0", "1=deep", "--save", "extractor.pt"]
    at_root = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    load = "import torch; e = torch.load('extractor.pt', weights_only=False); print(e.training, *e(torch.rand(2, 4)))"
    done = process("-m", "featx", *arguments, "--train", **at_root)
    assert done.stdout == "saved as extractor.pt; load it with torch.load('extractor.pt', weights_only=False)\n"
    assert (done.returncode, done.stderr) == (0, NOTE)
    assert process("-c", load, **at_root).stdout == "True 0 deep\n"
    # As a file of another name, and with an input at once.
    (folder / "vendored.py").write_text((ROOT / "featx.py").read_text())
    done = process("vendored.py", *arguments, "--input", "2,4")
    assert done.stdout.splitlines()[1].split()[:2] == ["0", "2x4"]
    assert process("-c", load).stdout == "False 0 deep\n"
    assert json.loads(process("vendored.py", *arguments, "--json").stdout) == []


def test_plot(call: Call) -> None:
    from PIL import Image

    features = ["x", "conv_proj", "encoder.layers.encoder_layer_0"]
    assert call(VIT, "--image", PHOTOGRAPH, *features, "--plot", "maps.png")[0] == 0
    with Image.open("maps.png") as drawn:
        assert drawn.width > drawn.height > 100
        third = drawn.convert("L").crop((0, drawn.height - 60, drawn.width, drawn.height - 20))
    columns = torch.frombuffer(bytearray(third.tobytes()), dtype=torch.uint8).reshape(40, -1)
    assert (columns < 250).all(0).float().mean() > 0.98  # the tokens use the whole width


@pytest.mark.parametrize(
    ("size", "picture"),
    [
        ((64, 7, 5), (7, 8 * 6)),
        ((3, 7, 5), (7, 8 * 6)),
        ((7, 7, 96), (7, 8 * 8)),
        ((64, 4, 32, 32), (32, 8 * 35)),
        ((50, 768), (50, 768)),
        ((512, 1, 1), (1, 512)),
        ((10,), (1, 10)),
        ((), (1, 1)),
    ],
)
def test_pictures_of_all_shapes(size: Tuple[int, ...], picture: Tuple[int, int]) -> None:
    assert featx._picture(torch.zeros(size, dtype=torch.bool)).shape == picture


def test_pictures_show_channels_side_by_side() -> None:
    for value in (torch.arange(96.0).expand(7, 7, 96), torch.arange(3.0)[:, None, None, None].expand(3, 2, 7, 7)):
        drawn = featx._picture(value).reshape(7, 8, 8)
        assert drawn[..., 7].isnan().all()
        for channel in range(min(8, len(value.unique()))):
            assert (drawn[:, channel, :7] == channel).all()


def test_device(call: Call) -> None:
    code, out, err = call("mymod:build", "0", "--input", "1,4", "--device", "cuda")
    if torch.cuda.is_available():
        assert (code, out.splitlines()[1].split()[:2]) == (0, ["0", "1x4"])
    else:
        assert (code, len(err.splitlines())) == (2, 1)
        assert "CUDA" in err or "NVIDIA" in err


# --- what goes wrong ---

COMPUTE = ["mymod:build", "0", "--input", "2,4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PACKAGE.MODULE:CALLABLE\n"),
        (["mymod"], "the model is given as PACKAGE.MODULE:CALLABLE, as in an import, not 'mymod'"),
        (["./mymod.py:build"], "PACKAGE.MODULE:CALLABLE, as in an import, not './mymod.py:build'\n"),
        (["mymod.py:build"], "the model is given as PACKAGE.MODULE:CALLABLE, as in an import"),
        ([".mymod:build"], "the model is given as PACKAGE.MODULE:CALLABLE, as in an import"),
        (["no_such_package:x"], "No module named 'no_such_package'"),
        (["mymod:nope"], "module 'mymod' has no attribute 'nope'"),
        (["mymod:os.getcwd"], "gives str, not a torch.nn.Module"),
        (["mymod:build", "--kwargs", "{x"], "argument --kwargs: invalid 'JSON object' value: '{x'"),
        (["mymod:build", "--kwargs", "[1]"], "argument --kwargs: invalid 'JSON object' value"),
        (["mymod:build", "--kwargs", '{"nope": 1}'], "TypeError: build() got an unexpected keyword argument 'nope'"),
        (["mymod:build", "--input", "big"], "argument --input: invalid 'list of sizes' value: 'big'"),
        (["mymod:build", "--input=-1,4"], "negative dimension -1"),
        (["mymod:build", "--input", "1", "--image", "x"], "not allowed with argument"),
        (["mymod:build", "--no-such-option"], "--no-such-option"),
        (["mymod:build", "0"], "computing features needs --image FILE or --input SHAPE"),
        (["mymod:build", "0", "--save", "x", "--plot", "y"], "computing features needs --image FILE or --input SHAPE"),
        (["mymod:build", "--save", "x"], "--save and --plot need at least one query"),
        (["mymod:build", "--plot", "x"], "--save and --plot need at least one query"),
        (["mymod:build", "0", "--check", "x"], "--check compares all names and takes no queries"),
        (["mymod:build", "--check", ""], "No such file"),
        (["mymod:build", "--check", "nowhere.json"], "nowhere.json"),
        *((["mymod:build", "--check", f"no_names_{n}.json"], f"no_names_{n}.json holds no names;") for n in range(4)),
        (["mymod:build", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        ([*COMPUTE, "--device", "abacus"], "abacus"),
        ([*COMPUTE, "--save", "no/where.pt"], "Parent directory no does not exist"),
        ([*COMPUTE, "--plot", "no/where.png"], "no/where.png"),
        ([*COMPUTE, "--plot", "maps.nope"], "nope"),
        ([*COMPUTE, "0=b"], "a query was given twice: 0, 0=b"),
        ([*COMPUTE, "0=a", "1=a"], "a query was given twice"),
        (["mymod:build", "0=a", "1=a", "--input", "2,4"], "both '0' and '1' are put under the key 'a'\n"),
        (["mymod:build", "0", "--image", "nowhere.jpg"], "nowhere.jpg cannot be read: "),
        (["mymod:build", "0", "--image", "mymod.py"], "mymod.py cannot be read: cannot identify image file"),
        (["mymod:build", "0", "--image", "cut.jpg"], "cut.jpg cannot be read: image file is truncated"),
        (["mymod:build", "0", "--input", "2,3"], "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (
            ["mymod:build", "linear", "--input", "2,4"],
            "has no 'linear'; the closest: none; without queries all are listed",
        ),
        ([RESNET, "layr1", "--input", "1,3,64,64"], "the eval graph has no 'layr1'; the closest: layer1, "),
        (["mymod:fails", "--kwargs", '{"kind": "RuntimeError"}'], "RuntimeError: no text; --debug shows where"),
        (["mymod:fails", "--kwargs", '{"kind": "SystemExit"}'], "SystemExit: no text; --debug shows where"),
        (["mymod:fails", "--kwargs", '{"kind": "KeyError", "text": ["NOPE"]}'], "KeyError: 'NOPE'\n"),
        (["mymod:fails", "--kwargs", '{"kind": "OSError", "text": ["two\\nlines"]}'], "OSError: two lines\n"),
        (["mymod:branching"], "cannot trace Branching at '1': TraceError: symbolically traced variables cannot be"),
        (["mymod:branching"], " control flow; --auto-leaf makes it one operation\n"),
        (["mymod:Branching", "--auto-leaf"], "the model's own forward (Branching): TraceError: "),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(arguments: List[str], message: str, call: Call) -> None:
    code, out, err = call(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("featx: error: ")
    assert message in err


def test_a_detection_model_gets_a_short_line(call: Call) -> None:
    model = "torchvision.models.detection:fasterrcnn_mobilenet_v3_large_320_fpn"
    code, out, err = call(model, "--kwargs", '{"weights_backbone": null}')
    assert (code, out, len(err) < 200) == (2, "", True)
    assert re.fullmatch(r"featx: error: .* own forward \(FasterRCNN\): .*; --debug shows the line\n", err)


def test_debug_shows_the_traceback(call: Call) -> None:
    code, out, err = call("mymod:fails", "--kwargs", '{"kind": "RuntimeError"}', "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback ")
    assert "mymod.py" in err
    assert err.splitlines()[-1].startswith("featx: error: RuntimeError: ")


def test_what_a_model_prints_and_warns_of_is_no_output(call: Call) -> None:
    code, out, err = call("mymod:noisy", "--json")
    assert (code, err) == (0, "hello\nfeatx: warning: two lines\n")
    assert json.loads(out)["eval"] == ["input", "0", "1"]


@pytest.mark.parametrize(("package", "option"), [("matplotlib", "--plot"), ("PIL", "--image")])
def test_what_is_not_installed(package: str, option: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, "matplotlib.figure", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = {"--plot": ["--input", "2,4", "--plot", "x.png"], "--image": ["--image", PHOTOGRAPH]}[option]
    code, _, err = call("mymod:build", "0", *arguments)
    assert (code, package in err, err.count("\n")) == (2, True, 1)


def test_an_interrupt(folder: Path) -> None:
    done = process(str(ROOT / "featx.py"), "mymod:interrupted")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "featx.py"), "mymod:build"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None
        done.stdout.close()
        assert done.stderr is not None
        assert done.stderr.read() == b""
    assert done.returncode == 130


def test_help(call: Call) -> None:
    assert "PACKAGE.MODULE:CALLABLE" in call("--help")[1]
