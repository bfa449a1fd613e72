"""The command line: most of it in this process, what is about processes through real ones."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest
import torch

from tests import featx
from tests.helpers import ROOT, parametrize

PHOTOGRAPH = str(ROOT / "tests" / "data" / "grace_hopper.jpg")
RESNET, GOOGLENET, VIT = (f"torchvision.models:{name}" for name in ("resnet18", "googlenet", "vit_b_32"))
SMALL = ["--kwargs", '{"init_weights": false}', "--input", "2,3,64,64"]  # for googlenet

MYMOD = """
import builtins, os, signal, warnings
import torch
from torch import nn

class Constant(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0, 2.0])

class Channels(nn.Module):
    def forward(self, x):
        return x * 0 + torch.arange(96.0)[:, None, None]

class Nested(nn.Module):
    def forward(self, x):
        return {"size": x.shape[0], "none": [], "nan": x / 0 * 0, "sparse": x.to_sparse(), "plain": (x, 3)}

class Types(nn.Module):
    def forward(self, x):
        return x.to_sparse(), torch.complex(x, x), x[:0], x.long()

class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.linear(x))

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

def wrapped():
    return {"epoch": 3, "state_dict": build().state_dict()}

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
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "object.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return tmp_path


Call = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: the exit code, and what was printed."""

    def result(*arguments: str) -> Tuple[int, str, str]:
        skip_without_torchvision(*arguments)
        featx._notes.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.onceregistry.clear()
            try:
                code = featx._main(arguments)
            except SystemExit as stopped:
                code = stopped.code
        return (code, *capsys.readouterr())

    return result


def skip_without_torchvision(*arguments: str) -> None:
    if any(argument.startswith("torchvision") for argument in arguments):
        pytest.importorskip("torchvision")


def process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def output(printed: Tuple[int, str, str]) -> str:
    """What was printed, if all went well."""
    code, out, err = printed
    assert (code, err) == (0, "")
    return out


def table(printed: Tuple[int, str, str]) -> List[List[str]]:
    """The cells of what was printed; two spaces or more part them."""
    lines = output(printed).splitlines()
    return [re.split("  +", line) for line in lines]


def features(printed: Tuple[int, str, str]) -> Any:
    rows = json.loads(output(printed))
    return {row["name"]: row for row in rows}


STATISTICS = "min max mean std".split()

# --- names ---


def test_table_of_nodes(call: Call) -> None:
    assert table(call("mymod:Makers.build")) == [
        ["name", "operation", "target", "note"],
        ["input", "placeholder", "input"],
        ["0", "call_module", "Linear"],
        ["1", "call_module", "ReLU"],
    ]


def test_table_with_an_input(call: Call) -> None:
    titles, x, *_, mul = table(call("mymod:Constant", "--input", "3,2"))
    before = "name operation target shape dtype".split()
    assert titles == [*before, *STATISTICS, "note"]
    assert x[:5] == ["x", "placeholder", "x", "[3, 2]", "torch.float32"]
    assert mul[:4] == ["mul", "call_function", "operator.mul", "[3, 2]"]
    rows = table(call("mymod:Nested", "--input", "3,2"))
    assert ["getitem", "call_function", "operator.getitem"] in rows  # which is no tensor


def test_table_of_each_mode(call: Call) -> None:
    zoo = pytest.importorskip("torchvision.models")
    model = zoo.googlenet(init_weights=False)
    names = featx.get_graph_node_names(model, suppress_diff_warning=True)
    rows = table(call(GOOGLENET, *SMALL))
    assert [row[0] for row in rows[1:]] == names.eval
    assert rows[2][3] == "[2, 64, 32, 32]"
    rows = table(call(GOOGLENET, "--train", *SMALL))
    assert [row[0] for row in rows[1:]] == names.train
    noted = {row[0] for row in rows if row[-1].startswith("in this mode only.")}
    assert noted == set(names.train) - set(names.eval)


LAYER = "encoder.layers.encoder_layer_0"
BN1, LN1 = ("layer1.0.bn1", "BatchNorm2d"), (f"{LAYER}.ln_1", "LayerNorm")


@parametrize(
    ("model", "name", "target", "note"),
    [
        (RESNET, *BN1, "is overwritten in place by the module 'layer1.0.relu'."),
        (VIT, *LN1, f"is the value of the module '{LAYER}.ln_2', not what "),
    ],
)
def test_notes(call: Call, model: str, name: str, target: str, note: str) -> None:
    (row,) = (row for row in table(call(model)) if row[0] == name)
    assert row[1:3] == ["call_module", target]
    assert row[3].startswith(note)
    (row,) = (row for row in table(call(model, "--exact")) if row[0] == name)
    assert row[2:] in ([target], ["featx._clone"])  # without a note


def test_json_and_check(call: Call, folder: Path) -> None:
    zoo = pytest.importorskip("torchvision.models")
    out = output(call(RESNET, "--json"))
    names = featx.get_graph_node_names(zoo.resnet18())._asdict()
    assert json.loads(out) == {"model": RESNET, "exact": False, "input": None, "image": None, **names}
    (folder / "names.json").write_text(out)
    assert call(RESNET, "--check", "names.json") == (0, "\n", "")
    other = "torchvision.models:resnet34"
    code, out, err = call(other, "--check", "names.json")
    lines = out.splitlines()
    assert (code, err) == (1, "")
    assert lines[:2] == ["--- names.json", "+++ train"]
    assert {"+++ eval", "+layer1.2.conv1"} <= set(lines)
    assert not [line for line in lines if re.match("-[^-]", line)]


@parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_file_may_be_written_by_any_shell(call: Call, folder: Path, encoding: str) -> None:
    out = call(VIT, "--json", "--exact")[1]
    (folder / "exact.json").write_text(out, encoding)
    assert call(VIT, "--check", "exact.json")[0] == 0  # the file says how it was written


def test_check_gives_its_exit_code(call: Call, folder: Path) -> None:
    (folder / "names.json").write_text(call("mymod:build", "--json")[1])
    assert call("mymod:build", "--check", "names.json")[0] == 0
    code, out, _ = call("torch.nn:Sequential", "--check", "names.json")
    assert code == 1
    assert "\n-1\n" in out


def test_check_compares_shapes(call: Call, folder: Path) -> None:
    sizes = ["--kwargs", '{"in_features": 4, "out_features": 6}']
    listed = json.loads(output(call("torch.nn:Linear", *sizes, "--input", "3,4", "--json")))
    assert listed["shapes"] == ["input [3, 4]", "weight [6, 4]", "bias [6]", "linear [3, 6]"]
    (folder / "names.json").write_text(json.dumps(listed))
    assert call("torch.nn:Linear", *sizes, "--check", "names.json")[:2] == (0, "\n")  # its input is in the file
    sizes[1] = sizes[1].replace("6", "5")
    code, out, _ = call("torch.nn:Linear", *sizes, "--check", "names.json")
    assert (code, out.splitlines()[-1]) == (1, "+linear [3, 5]")
    del listed["shapes"]
    (folder / "names.json").write_text(json.dumps(listed))
    assert call("torch.nn:Linear", *sizes, "--check", "names.json")[0] == 0


# --- features ---


def test_features_of_a_photograph(call: Call) -> None:
    zoo = pytest.importorskip("torchvision.models")
    arguments = [RESNET, "--image", PHOTOGRAPH, "layer1", "layer4=deep"]
    torch.manual_seed(0)
    extractor = featx.create_feature_extractor(zoo.resnet18().eval(), ["layer4"])
    with torch.no_grad():
        deep = extractor(featx._photograph(PHOTOGRAPH))["layer4"]
    expected = [getattr(deep, name)().item() for name in STATISTICS]
    _, layer1, row = table(call(*arguments))
    assert layer1[0] == "layer1"
    assert row[:5] == ["deep", "call_module", "ReLU", "[1, 512, 7, 7]", "torch.float32"]
    assert [*map(float, row[5:])] == pytest.approx(expected, rel=1e-4)
    found = features(call(*arguments, "--json"))["deep"]
    assert found["shape"] == [1, 512, 7, 7]
    assert found["dtype"] == "torch.float32"
    assert [found[name] for name in STATISTICS] == pytest.approx(expected, rel=1e-4)


@parametrize("size", [(512, 600), (1600, 1200), (300, 500)])
def test_a_photograph_is_prepared_as_by_torchvision(size: Tuple[int, int], folder: Path) -> None:
    """Not to the bit: they round the middle to whole pixels after resizing, half a pixel at most."""
    from PIL import Image

    presets = pytest.importorskip("torchvision.transforms._presets")
    prepare = presets.ImageClassification(crop_size=224)
    with Image.open(PHOTOGRAPH) as file:
        image = file.convert("RGB").resize(size)
    image.save("sized.png")
    expected = prepare(image)[None]
    found = featx._photograph("sized.png")
    assert (found - expected).abs().mean() < 0.1
    assert (found.flip(3) - expected).abs().mean() > 0.5  # so the limit can fail


@parametrize("size", [(1, 3000), (3000, 1), (1, 1), (300, 200)])
def test_photographs_of_all_sizes(size: Tuple[int, int], folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", size, (10, 20, 30)).save("odd.png")
    assert featx._photograph("odd.png").shape == (1, 3, 224, 224)


def test_a_photograph_that_lies_on_its_side(folder: Path) -> None:
    from PIL import Image

    upright = Image.new("RGB", (300, 300), "black")
    upright.paste("white", (0, 0, 300, 150))
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: turn it clockwise
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save("lying.png", exif=exif)
    upright.save("upright.png")
    lying.save("told_nothing.png")
    prepared = featx._photograph("upright.png")
    assert torch.equal(featx._photograph("lying.png"), prepared)
    assert not torch.equal(featx._photograph("told_nothing.png"), prepared)


def test_features_of_one_mode_only(call: Call) -> None:
    found = features(call(GOOGLENET, "aux1.fc1", "--train", "--json", *SMALL))
    assert found["aux1.fc1"]["shape"] == [2, 1024]
    assert found["aux1.fc1"]["note"] == "in this mode only. "
    _, _, err = call(GOOGLENET, "aux1", *SMALL)
    assert "the eval graph is named 'aux1'" in err


def test_exact_features(call: Call) -> None:
    arguments = [RESNET, "bn1", "relu", "--input", "1,3,64,64", "--json"]
    default = features(call(*arguments))
    exact = features(call(*arguments, "--exact"))
    assert default["bn1"]["note"] == "is overwritten in place by the module 'relu'. "
    assert exact["bn1"]["note"] == ""
    assert exact["bn1"]["min"] < 0 == exact["relu"]["min"] == default["bn1"]["min"]


def test_features_that_are_no_tensors(call: Call) -> None:
    arguments = ["mymod:Nested", "output=all", "getitem", "--input", "3,2"]
    rows = features(call(*arguments, "--json"))
    assert rows["all"] == {"name": "all", "note": ""}
    assert rows["getitem"]["operation"] == "call_function"
    assert "shape" not in rows["getitem"]
    assert table(call(*arguments))[1] == ["all"]


@parametrize("query", ["to_sparse", "complex", "getitem", "long"])
def test_what_a_type_has_no_statistics_for_is_left_out(call: Call, query: str) -> None:
    row = features(call("mymod:Types", query, "--input", "3,2", "--json"))[query]
    assert {"shape", "dtype"} <= set(row)
    assert ("min" in row) == (query == "long")
    assert "mean" not in row


def test_auto_leaf(call: Call) -> None:
    for arguments in ([], ["1", "--input", "2,4"]):
        code, out, err = call("mymod:branching", "--auto-leaf", *arguments)
        assert code == 0
        assert out.splitlines()[-1].startswith("1 ")
        assert err.count("'leaf_modules': [mymod.Branching]") == 1


def test_checkpoint(call: Call, folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).requires_grad_(False)
    torch.save(model.state_dict(), "state.pt")
    arguments = ["mymod:build", "0", "--input", "2,4", "--json"]
    loaded = features(call(*arguments, "--checkpoint", "state.pt"))
    torch.manual_seed(0)
    torch.nn.Linear(4, 4)  # as the command builds its own before it draws the input
    mean = float(model(torch.rand(2, 4)).mean())
    assert loaded["0"]["mean"] == pytest.approx(mean, rel=1e-4)


@parametrize(
    ("kind", "message"),
    [
        ("build", "Weights only load failed"),
        ("Hostile", "Weights only load failed"),
        ("wrapped", "Error(s) in loading state_dict for Sequential"),
    ],
)
def test_checkpoints_that_are_none(call: Call, folder: Path, kind: str, message: str) -> None:
    mymod = importlib.import_module("mymod")
    torch.save(getattr(mymod, kind)(), "state.pt")
    code, out, err = call("mymod:build", "--checkpoint", "state.pt")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not (folder / "owned").exists()


def plotted(call: Call, *arguments: str) -> Any:
    """The pixels of what is drawn."""
    from PIL import Image

    code, _, err = call(*arguments, "--plot", "maps.png")
    assert (code, err) == (0, "featx: note: maps.png shows the features\n")
    with Image.open("maps.png") as drawn:
        return drawn.convert("RGB")


def test_plot(call: Call) -> None:
    queries = ["conv_proj", LAYER, "heads"]  # maps, tokens and a matrix
    drawn = plotted(call, VIT, *queries, "--image", PHOTOGRAPH)
    assert drawn.width > drawn.height >= 300
    assert len(drawn.getcolors(1_000_000)) > 200


def test_a_plot_shows_eight_channels_side_by_side(call: Call) -> None:
    drawn = plotted(call, "mymod:Channels", "add", "--input", "2,96,7,7")
    colors = drawn.crop((0, 40, drawn.width, 80)).getcolors(1_000_000)
    assert sum(count > 1000 for count, _ in colors) == 9  # with the gaps between them


def test_device(call: Call) -> None:
    code, out, err = call("mymod:build", "0", "--input", "1,4", "--device", "cuda")
    if torch.cuda.is_available():
        assert code == 0
        assert out.splitlines()[1].startswith("0 ")
    else:
        assert code == 2
        assert err.count("\n") == 1
        assert "CUDA" in err or "NVIDIA" in err


# --- what goes wrong ---

# The arguments, as a line -> what is said of them.
WRONG = {
    "": "the following arguments are required: model",
    "mymod": "ValueError: Empty module name",
    "mymod.py:build": "No module named 'mymod.py'",
    "no_such_package:x": "No module named 'no_such_package'",
    "mymod:nope": "module 'mymod' has no attribute 'nope'",
    "mymod:os.getcwd": "'str' object has no attribute 'to'",
    "mymod:build --kwargs {x": "JSONDecodeError: Expecting property name",
    "mymod:build --kwargs [1]": "must be a mapping",
    'mymod:build --kwargs {"nope":1}': "build() got an unexpected keyword argument 'nope'",
    "mymod:build --input big": "JSONDecodeError: Expecting value",
    "mymod:build --input=-1,4": "negative dimension -1",
    "mymod:build --input 2,3": "mat1 and mat2 shapes cannot be multiplied",
    "mymod:build --no-such-option": "--no-such-option",
    "mymod:build --check=": "IsADirectoryError",
    "mymod:build --check nowhere.json": "nowhere.json",
    "mymod:build --check empty.json": "JSONDecodeError",
    "mymod:build --check object.json": "KeyError: 'train'",
    "mymod:build --checkpoint nowhere.pt": "nowhere.pt",
    "mymod:build --device abacus": "abacus",
    "mymod:build --plot maps.png": "featx: error: ValueError: ",
    "mymod:Constant --input 2 --plot maps.png": "IndexError: Dimension out of range",
    "mymod:build --input 2,4 --plot no/where.png": "no/where.png",
    "mymod:build --input 2,4 --plot maps.nope": "nope",
    "mymod:build 0=a 1=a": "both '0' and '1' are put under the key 'a'",
    "mymod:build --image nowhere.jpg": "nowhere.jpg",
    "mymod:build --image mymod.py": "cannot identify image file",
    "mymod:build --image cut.jpg": "OSError: image file is truncated",
    "mymod:build linear": "no node of the eval graph is named 'linear'",
    f"{RESNET} layr1": "named 'layr1' or lies below it. The closest: 'layer1'",
    'mymod:fails --kwargs {"kind":"KeyError","text":["NOPE"]}': "KeyError: 'NOPE'",
    'mymod:fails --kwargs {"kind":"OSError","text":["two\\nlines"]}': "OSError: two lines",
    "mymod:branching": "UntraceableError: torch.fx cannot trace mymod.Branching at '1': TraceError: ",
    "mymod:Branching --auto-leaf": "the model's own forward (mymod.Branching): TraceError: ",
}


@parametrize("line", WRONG)
def test_wrong_input_gets_one_line_and_exit_code_2(line: str, call: Call) -> None:
    code, out, err = call(*line.split())
    *notes, error = err.splitlines()
    assert (code, out) == (2, "")
    assert all(note.startswith("featx: note: ") for note in notes)
    assert error.startswith("featx: error: ")
    assert WRONG[line] in error
    assert len(error) < 330


def test_debug_shows_the_traceback(call: Call) -> None:
    code, out, err = call("mymod:fails", "--kwargs", '{"kind": "RuntimeError"}', "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback ")
    assert "mymod.py" in err
    assert err.splitlines()[-1].startswith("featx: error: RuntimeError:")


def test_what_a_model_prints_and_warns_of_is_no_output(call: Call) -> None:
    code, out, err = call("mymod:noisy", "--json")
    assert (code, err) == (0, "hello\nfeatx: warning: two lines\n")
    assert json.loads(out)["eval"] == ["input", "0", "1"]


@parametrize(("package", "option"), [("matplotlib", "--plot=x.png"), ("PIL", f"--image={PHOTOGRAPH}")])
def test_what_is_not_installed(package: str, option: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = call("mymod:build", option)
    assert (code, package in err, err.count("\n")) == (2, True, 1)


def test_an_interrupt(folder: Path) -> None:
    done = process("-m", "featx", "mymod:interrupted")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    command = [sys.executable, "-m", "featx", "mymod:build"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as done:
        assert done.stdout is not None
        done.stdout.close()
        assert done.stderr is not None
        assert done.stderr.read() == b""
    assert done.returncode == 130


def test_a_file_of_another_name(folder: Path) -> None:
    source = Path(featx.__file__).read_text(encoding="utf-8")
    (folder / "vendored.py").write_text(source, encoding="utf-8")
    done = process("vendored.py", "mymod:Writes", "--exact")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[2] for line in done.stdout.splitlines()[1:]] == ["x", "Linear", "ReLU"]


def test_help(call: Call) -> None:
    assert "PACKAGE.MODULE:CALLABLE" in call("--help")[1]


def test_example(call: Call) -> None:
    code, out, _ = call("mymod:Branching", "--input", "2,4", "--example")
    assert code == 0
    assert "_assert" in out
    assert call("mymod:Branching", "--input", "2,4")[0] == 2
