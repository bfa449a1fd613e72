"""The command line, through real processes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import pytest
import torch

from tests import featx

ROOT = Path(__file__).parent.parent
PHOTOGRAPH = ROOT / "tests" / "data" / "grace_hopper.jpg"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    skip_without_torchvision(arguments)
    command = [sys.executable, "-m", "featx", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def skip_without_torchvision(arguments: Sequence[str]) -> None:
    if any(argument.startswith("torchvision") for argument in arguments):
        pytest.importorskip("torchvision")


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in this process; the folder that it puts on the path goes again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return featx._main


@pytest.fixture
def refused(main: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The message for arguments that must be refused; in this process, since there are many."""

    def message(*arguments: str) -> str:
        skip_without_torchvision(arguments)
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        said = capfd.readouterr()
        assert (raised.value.code, said.out, len(said.err.splitlines())) == (2, "", 1)
        assert said.err.startswith("featx: error: ")
        return str(said.err)

    return message


def test_features_of_a_photograph() -> None:
    zoo = pytest.importorskip("torchvision.models")
    table = rows(run("torchvision.models:resnet18", "--image", str(PHOTOGRAPH), "layer1", "layer4=deep"))
    assert table[0] == ["key", "shape", "dtype", "mean", "std", "min", "max"]
    assert [row[:3] for row in table[1:]] == [["layer1", "1x64x56x56", "float32"], ["deep", "1x512x7x7", "float32"]]
    torch.manual_seed(0)
    model = zoo.resnet18().eval()
    with torch.no_grad():
        deep = featx.create_feature_extractor(model, ["layer4"])(featx._read_image(str(PHOTOGRAPH)))["layer4"]
    assert float(table[2][3]) == pytest.approx(float(deep.mean()), rel=1e-3)
    assert float(table[2][6]) == pytest.approx(float(deep.max()), rel=1e-3)


def test_the_photograph_is_prepared_as_torchvisions_presets_do() -> None:
    from PIL import Image

    presets = pytest.importorskip("torchvision.transforms._presets")
    with Image.open(PHOTOGRAPH) as file:
        theirs = presets.ImageClassification(crop_size=224)(file.convert("RGB"))
    ours = featx._read_image(str(PHOTOGRAPH))[0]
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_table_of_nodes() -> None:
    zoo = pytest.importorskip("torchvision.models")
    table = rows(run("torchvision.models:resnet18"))
    assert table[0] == ["name", "operation", "target", "shape", "note"]
    assert table[2] == ["conv1", "call_module", "Conv2d"]
    assert [row[0] for row in table[1:]] == featx.get_graph_node_names(zoo.resnet18()).eval


def test_table_with_shapes_and_notes() -> None:
    zoo = pytest.importorskip("torchvision.models")
    options = ["--kwargs", '{"init_weights": false}', "--input", "1,3,64,64"]
    table = rows(run("torchvision.models:googlenet", *options))
    shapes = {row[0]: row[3] for row in table[1:] if len(row) == 4}
    assert shapes["conv1.conv"] == "1x64x32x32"
    notes = {row[0] for row in table if row[-2:] == ["train", "only"] or ["train", "only,"] in (row[3:5], row[4:6])}
    names = featx.get_graph_node_names(zoo.googlenet(init_weights=False), suppress_diff_warning=True)
    assert notes == set(names.train) - set(names.eval)
    table = rows(run("torchvision.models:googlenet", "--train", "--kwargs", '{"init_weights": false}'))
    assert [row[0] for row in table[1:]] == names.train


def test_features_of_one_mode_only() -> None:
    options = ["--kwargs", '{"init_weights": false}', "--input", "2,3,64,64"]
    table = rows(run("torchvision.models:googlenet", "aux1", "--train", *options))
    assert [row[0] for row in table] == ["key", "aux1"]
    assert run("torchvision.models:googlenet", "aux1", *options).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torchvision.models"], "PACKAGE.MODULE:CALLABLE"),
        ([":resnet18"], "PACKAGE.MODULE:CALLABLE"),
        (["torch.nn:Identity", "--check", ""], "takes a value that is not empty"),
        (["torch.nn:Identity", "--check", "x", "--json"], "takes no queries and no --json"),
        (["torch.nn:Identity", "--kwargs", "[" * 10_000], "is no JSON"),
        (["torch.nn:Identity", "--input=-1,4"], "takes sizes such as 1,3,224,224"),
        (["torch.nn:Identity", "--input", "99999999999999999999"], "takes sizes such as 1,3,224,224"),
        (["torch.nn:Identity", "output", "--input", "2", "--plot", "folder/"], "--plot takes a file of a type among"),
        (["torch.nn:Identity", "output", "--input", "0,4", "--plot", "x.png"], "--plot has nothing to draw"),
        (["torch.nn:Identity", "--bogus=a\nb"], "--bogus=a b"),
        (["sys:exit"], "the model's own code wants to exit"),
        (["torchvision.models:nope"], "no callable 'nope'"),
        (["no_such_package:x"], "No module named 'no_such_package'"),
        (["torch:__version__"], "no callable"),
        (["builtins:dict"], "gives dict, not a torch.nn.Module"),
        (["torch.nn:Identity", "layer1"], "needs --image FILE or --input"),
        (["torch.nn:Identity", "layer1", "--check", "x"], "--check compares all names and takes no queries"),
        (["torch.nn:Identity", "--save", "x"], "--save needs at least one query"),
        (["torch.nn:Identity", "--plot", "x"], "--plot needs at least one query"),
        (
            ["torch.nn:Identity", "layer1", "--save", "x", "--plot", "y"],
            "--plot needs --image FILE or --input",
        ),
        (["torch.nn:Identity", "layer1", "layer1=b", "--input", "1,3,64,64"], "was given twice"),
        (["torch.nn:Identity", "layer1=a", "layer2=a", "--input", "1,3,64,64"], "under the key 'a'"),
        (["torch.nn:Identity", "--check", "nowhere.json"], "nowhere.json"),
        (["torch.nn:Identity", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["torch.nn:Identity", "--device", "abacus"], "abacus"),
        (["torch.nn:Identity", "input", "--save", "no/where.pt"], "no"),
        (["torchvision.models:resnet18", "layr1", "--input", "1,3,64,64"], "The closest: 'layer1'"),
        (["torch.nn:Identity", "layer1", "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["torch.nn:Identity", "input", "--image", "featx.py"], "cannot identify image file"),
        (["torch.nn:Identity", "--kwargs", "{x"], "is no JSON"),
        (["torch.nn:Identity", "--kwargs", "[1]"], "takes a JSON object"),
        (["torchvision.models:resnet18", "--kwargs", '{"nope": 1}'], "nope"),
        (["torch.nn:Identity", "--input", "big"], "takes sizes such as 1,3,224,224"),
        (["torchvision.models:resnet18", "layer1", "--input", "3"], "input"),
        (["torchvision.models:vit_b_32", "conv_proj", "--input", "1,3,64,64"], "image height"),
        (["torch.nn:Identity", "--no-such-option"], "--no-such-option"),
        (["torchvision.models.optical_flow:raft_small"], "cannot trace the model's own forward"),
        ([], "required"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(arguments: list[str], message: str, refused: Any) -> None:
    assert message in refused(*arguments)


def test_auto_leaf(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(
        "from torch import nn\n"
        "class Bad(nn.Module):\n    def forward(self, x): return x if x.sum() > 0 else -x\n"
        "def model(): return nn.Sequential(nn.Linear(4, 4), Bad())\n"
    )
    command = [sys.executable, str(ROOT / "featx.py"), "branching:model"]

    def here(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)

    assert here().returncode == 2
    for arguments in ([], ["1", "--input", "2,4"]):
        done = here("--auto-leaf", *arguments)
        assert done.returncode == 0
        assert "'leaf_modules': [branching.Bad]" in done.stderr
        assert done.stdout.splitlines()[-1].split()[0] == "1"


def test_a_reader_that_has_seen_enough() -> None:
    command = [sys.executable, "-m", "featx", "torchvision.models:resnet18"]
    skip_without_torchvision(command)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_help_and_version() -> None:
    assert run("--version").stdout.strip() == featx.__version__
    assert "PACKAGE.MODULE:CALLABLE" in run("--help").stdout


# --- all options ---


def test_check_and_json(tmp_path: Path) -> None:
    zoo = pytest.importorskip("torchvision.models")
    names = tmp_path / "names.json"
    done = run("torchvision.models:resnet18", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    names.write_text(done.stdout)
    expected = featx.get_graph_node_names(zoo.resnet18())
    assert json.loads(done.stdout) == {
        "model": "torchvision.models:resnet18",
        "exact": False,
        "train": expected.train,
        "eval": expected.eval,
    }
    done = run("torchvision.models:resnet18", "--check", str(names))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"all names are those of {names}\n"
    done = run("torchvision.models:resnet34", "--check", str(names))
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"--- train: {names}", "+++ train: torchvision.models:resnet34"]
    assert f"--- eval: {names}" in lines
    assert "+layer1.2.conv1" in lines
    assert not [line for line in lines if line.startswith("-") and not line.startswith("---")]
    done = run("torchvision.models:resnet18", "--check", str(names), "--exact")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"featx: error: {names} was written without --exact\n"


def test_check_gives_its_exit_code(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, so that the tests of the tests reach it."""
    assert main(["torch.nn:ReLU", "--json"]) == 0
    (tmp_path / "names.json").write_text(capsys.readouterr().out)
    check = ["--check", str(tmp_path / "names.json")]
    assert main(["torch.nn:ReLU", *check]) == 0
    assert main(["torch.nn:Sequential", *check]) == 1
    assert "-relu\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"train": []}', "\x00"])
def test_check_against_something_else(content: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "names.json").write_text(content)
    assert str(tmp_path) in refused("torch.nn:ReLU", "--check", str(tmp_path / "names.json"))


def test_exact_and_json_of_features() -> None:
    arguments = ["torchvision.models:resnet18", "bn1", "relu", "--input", "1,3,64,64", "--json"]
    default, exact = run(*arguments), run(*arguments, "--exact")
    assert "featx: warning: the feature 'bn1' is overwritten in place by the module 'relu'" in default.stderr
    assert (len(default.stderr.splitlines()), exact.stderr) == (1, "")
    bn1, relu = json.loads(exact.stdout)
    assert (bn1["key"], bn1["shape"], bn1["dtype"]) == ("bn1", [1, 64, 32, 32], "float32")
    assert bn1["min"] < 0 == relu["min"]
    assert json.loads(default.stdout)[0]["min"] == 0


def test_structures_are_shown_item_by_item() -> None:
    options = ["--kwargs", '{"init_weights": false}', "--input", "2,3,64,64", "--train"]
    done = run("torchvision.models:googlenet", "output", *options, "--exact")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["key", "output[0]", "output[1]", "output[2]"]


def test_notes() -> None:
    done = run("torchvision.models:vit_b_32")
    notes = dict(re.findall(r"^(\S+) .*? (really .*|overwritten .*)$", done.stdout, re.MULTILINE))
    first = "encoder.layers.encoder_layer_0"
    assert notes[f"{first}.ln_1"] == f"really module '{first}.ln_2'"
    assert len(notes) == 12
    done = run("torchvision.models:resnet18")
    notes = dict(re.findall(r"^(\S+) .*? (overwritten by .*)$", done.stdout, re.MULTILINE))
    assert notes["layer1.0.bn1"] == "overwritten by layer1.0.relu"
    assert "layer1.0.relu" not in notes
    for model in ("vit_b_32", "resnet18"):
        assert not re.search("really|overwritten", run(f"torchvision.models:{model}", "--exact").stdout)


def test_checkpoint(tmp_path: Path) -> None:
    zoo = pytest.importorskip("torchvision.models")
    model = zoo.resnet18(num_classes=10)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    options = ["torchvision.models:resnet18", "fc", "--input", "1,3,64,64", "--json"]
    loaded = run(*options, "--kwargs", '{"num_classes": 10}', "--checkpoint", str(tmp_path / "state.pt"))
    torch.manual_seed(0)
    zoo.resnet18(num_classes=10)  # as the command builds its own before it draws the input
    expected = model.eval()(torch.rand(1, 3, 64, 64))
    assert json.loads(loaded.stdout)[0]["mean"] == pytest.approx(float(expected.detach().mean()), rel=1e-4)


class Hostile:
    """Runs code when it is unpickled in the usual way."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("owned"),)


def test_checkpoints_that_are_none(tmp_path: Path, refused: Any) -> None:
    zoo = pytest.importorskip("torchvision.models")
    model = zoo.resnet18()
    contents = {
        "model": (model, "Weights only load failed"),
        "hostile": (Hostile(), "Weights only load failed"),
        "nested": ({"state_dict": model.state_dict(), "epoch": 3}, "holds a dict with the keys state_dict, epoch;"),
        "list": ([1], "holds a list; --checkpoint takes a state dict"),
        "other": (zoo.alexnet().state_dict(), "Error(s) in loading state_dict for ResNet"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / name)
        assert message in refused("torchvision.models:resnet18", "--checkpoint", str(tmp_path / name))
    assert not (ROOT / "owned").exists()


def test_save(tmp_path: Path) -> None:
    file = tmp_path / "extractor.pt"
    done = run("torchvision.models:resnet18", "layer1", "layer2=deep", "--save", str(file), "--train")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"saved as {file}; load it with torch.load('{file}', weights_only=False)\n"
    load = f"import torch; e = torch.load({str(file)!r}, weights_only=False)"
    code = f"{load}; print(e.training, *e(torch.rand(2, 3, 64, 64)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (loaded.stdout, loaded.stderr) == ("True layer1 deep\n", "")
    # run as a file, and with an input at once
    arguments = ["torchvision.models:resnet18", "layer1", "--save", str(file), "--input", "1,3,64,64"]
    done = subprocess.run([sys.executable, "featx.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[1].split()[:2] == ["layer1", "1x64x16x16"]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout == "False layer1\n"


def test_what_is_saved_for_one_mode_only(tmp_path: Path) -> None:
    options = ["--kwargs", '{"init_weights": false}', "--train", "--save", str(tmp_path / "extractor.pt")]
    done = run("torchvision.models:googlenet", "aux1", *options)
    assert done.returncode == 0
    assert "featx: warning: what was saved returns features in train mode only" in done.stderr


def test_plot(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "maps.png"
    done = run("torchvision.models:swin_t", "--image", str(PHOTOGRAPH), "features.1", "head", "--plot", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3
    with Image.open(file) as drawn:
        colours = drawn.convert("RGB").getcolors(2**20)
        assert drawn.width > drawn.height > 100
    assert len(colours) > 100
    done = run("torchvision.models:resnet18", "x", "--input", "1,3,64,64", "--plot", str(tmp_path / "no" / "maps.png"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_maps_of_all_shapes() -> None:
    def shapes(*size: int, **options: Any) -> List[Tuple[int, ...]]:
        return [tuple(drawn.shape) for drawn in featx._maps(torch.zeros(*size, **options))]

    assert shapes(64, 7, 5) == [(7, 5)] * 8
    assert shapes(3, 7, 5) == [(7, 5)] * 3
    assert shapes(7, 7, 96) == [(7, 7)] * 8
    assert shapes(64, 4, 7, 5) == [(7, 5)] * 8
    assert shapes(50, 768) == [(50, 768)]
    assert shapes(512, 1, 1) == [(512,)]
    assert shapes(1, 1) == [(1,)]
    assert shapes(10, dtype=torch.complex64) == [(10,)]
    assert shapes(3, 2, 2, dtype=torch.bool) == [(2, 2)] * 3


@pytest.mark.parametrize(("package", "option"), [("matplotlib", "--plot"), ("PIL", "--image")])
def test_what_is_not_installed(package: str, option: str) -> None:
    absent = f"import sys; sys.modules.update({{'{package}': None, '{package}.figure': None}})"
    arguments = {"--plot": ["--input", "2,4", "--plot", "x.png"], "--image": ["--image", "x.jpg"]}[option]
    command = [
        sys.executable,
        "-c",
        f"{absent}; import featx; featx._main()",
        "torch.nn:Identity",
        "output",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"featx: error: {option} needs \w+: python3 -m pip install \w+\n", done.stderr)


def test_device() -> None:
    if torch.cuda.is_available():
        table = rows(run("torchvision.models:resnet18", "conv1", "--input", "1,3,64,64", "--device", "cuda"))
        assert table[1][:2] == ["conv1", "1x64x32x32"]
    else:
        done = run("torchvision.models:resnet18", "--device", "cuda")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert "CUDA" in done.stderr or "NVIDIA" in done.stderr


ODD = """
import sys
import torch
from torch import nn

class Constant(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.0, 2.0])

class Nested(nn.Module):
    def forward(self, x):
        return {"size": x.shape[0], "none": [], "sparse": x.to_sparse(), "plain": (x, 3)}

class Stubborn(Exception):
    def __str__(self):
        raise RuntimeError

class Unpicklable(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf = nn.ReLU()
        self.leaf.function = lambda x: x
    def forward(self, x):
        return self.leaf(x)

class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Makers:
    quoted = staticmethod(lambda: named('qu"o\\nte\\x1b[31m'))

def named(name):
    model = nn.Sequential()
    model.add_module(name, nn.ReLU())
    return model

def branching():
    return nn.Sequential(Branching())

def prints():
    print("hello")
    return nn.Sequential(nn.ReLU())

def fails(kind):
    raise {"stubborn": Stubborn, "exit": SystemExit, "base": BaseException, "pipe": BrokenPipeError}[kind]()
"""


@pytest.fixture
def odd(tmp_path: Path) -> Any:
    (tmp_path / "odd.py").write_text(ODD)

    def run_there(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "featx.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **options)

    return run_there


def test_shapes_of_models_with_constants_and_with_names_that_are_no_names(odd: Any) -> None:
    done = odd("odd:Constant", "--input", "3,2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["mul", "call_function", "mul", "3x2"]
    done = odd("odd:Makers.quoted", "--input", "3,2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ['qu"o\\nte\\x1b[31m', "call_module", "ReLU", "3x2"]


def test_features_that_are_no_tensors(odd: Any) -> None:
    done = odd("odd:Nested", "output", "--input", "3,2")
    assert (done.returncode, done.stderr) == (0, "")
    found = {row[0]: row[1:] for row in map(str.split, done.stdout.splitlines()[1:])}
    assert found["output[size]"] == ["3"]
    assert found["output[none]"] == ["[]"]
    assert found["output[sparse]"] == found["output[plain][0]"]
    assert found["output[plain][1]"] == ["3"]
    rows = {row["key"]: row for row in json.loads(odd("odd:Nested", "output", "--input", "3,2", "--json").stdout)}
    assert rows["output[size]"] == {"key": "output[size]", "value": "3"}
    assert rows["output[sparse]"]["shape"] == [3, 2]
    done = odd("torch.nn:Identity", "output", "--input", "3,2", "--device", "meta")
    assert done.stdout.splitlines()[1].split() == ["output", "3x2", "float32"]


def test_no_shape_of_what_is_no_tensor(odd: Any) -> None:
    rows = [line.split() for line in odd("odd:Nested", "--input", "3,2").stdout.splitlines()]
    assert ["getitem", "call_function", "getitem"] in rows
    assert ["x", "placeholder", "x", "3x2"] in rows


def test_streams_that_are_closed_or_of_another_kind(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as for somebody who calls it from Python."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["torch.nn:ReLU"]) == 0
    assert sys.stdout.getvalue().splitlines()[-1].split() == ["relu", "call_function", "relu"]
    with pytest.raises(SystemExit, match="2"):
        main(["torch.nn:ReLU", "--check", "names.json", "--json"])


def test_an_interrupt_in_this_process(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(featx, "_run", interrupt)
    assert main(["torch.nn:ReLU"]) == 130


def test_what_the_model_prints_is_no_output(odd: Any) -> None:
    done = odd("odd:prints", "--json")
    assert (done.returncode, done.stderr) == (0, "hello\n")
    assert json.loads(done.stdout)["eval"] == ["input", "0"]


@pytest.mark.parametrize("kind", ["stubborn", "exit", "base", "pipe"])
def test_whatever_a_model_raises_is_one_line(odd: Any, kind: str) -> None:
    done = odd("odd:fails", "--kwargs", json.dumps({"kind": kind}))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_advice_is_about_the_command_line(odd: Any) -> None:
    assert "--auto-leaf makes leaves of such classes" in odd("odd:branching").stderr
    options = ["--kwargs", '{"init_weights": false}', "--input", "2,3,64,64"]
    assert "--train chooses the train graph" in run("torchvision.models:googlenet", "aux1", *options).stderr


def test_a_file_is_written_only_when_all_went_well(odd: Any, tmp_path: Path) -> None:
    file = tmp_path / "extractor.pt"
    file.write_text("precious")
    for arguments in (
        ["odd:Unpicklable", "leaf"],
        ["torch.nn:ReLU", "output", "--input", "0,4", "--plot", "x.png"],
        ["odd:Constant", "mul", "--input", "3,5"],
    ):
        assert odd(*arguments, "--save", str(file)).returncode == 2
        assert file.read_text() == "precious"
    done = odd("torch.nn:ReLU", "output", "--save", str(file), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert file.read_bytes()[:2] == b"PK"


def test_a_copy_under_any_name_and_closed_streams(odd: Any, tmp_path: Path) -> None:
    (tmp_path / "my.copy.py").write_text((ROOT / "featx.py").read_text())
    command = [sys.executable, "my.copy.py", "torch.nn:ReLU"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for stream in ("1", "2"):
        closed = subprocess.run(f"{sys.executable} my.copy.py torch.nn:ReLU {stream}>&-", shell=True, cwd=tmp_path)
        assert closed.returncode == 0


def test_a_reader_of_a_difference_that_has_seen_enough(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"train": [], "eval": []}')
    command = (
        f"{sys.executable} featx.py torch.nn:ReLU --check {tmp_path / 'names.json'} | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_pictures_of_odd_proportions(tmp_path: Path) -> None:
    from PIL import Image

    for size in ((1, 3000), (3000, 1), (1, 1), (300, 200)):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "odd.png")
        assert featx._read_image(str(tmp_path / "odd.png")).shape == (1, 3, 224, 224)


def test_warnings_of_others_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "import warnings\nfrom torch import nn\n"
        "def model(fail=False):\n"
        "    warnings.warn('two\\nlines')\n"
        "    if fail: raise RuntimeError('three\\nmore\\nlines')\n"
        "    return nn.Sequential(nn.ReLU())\n"
    )
    command = [sys.executable, str(ROOT / "featx.py"), "noisy:model"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "featx: warning: two lines\n")
    done = subprocess.run([*command, "--kwargs", '{"fail": true}'], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "featx: error: three more lines\n")


def test_names_that_the_encoding_lacks(tmp_path: Path) -> None:
    (tmp_path / "letters.py").write_text(
        "from torch import nn\n"
        "def model():\n    net = nn.Sequential()\n    net.add_module('\\u03b1', nn.ReLU())\n    return net\n"
    )
    command = [sys.executable, str(ROOT / "featx.py"), "letters:model"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u03b1" in done.stdout


# --- on a terminal ---


def on_a_terminal(arguments: List[str], columns: int = 80, cwd: Path = ROOT, **environment: str) -> str:
    """What a person sees in a terminal of this width."""
    skip_without_torchvision(arguments)
    child, descriptor = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.chdir(cwd)
        # Not execv, whose environment has what libraries of C put there, such as COLUMNS.
        known = {**os.environ, "TERM": "xterm", **environment}
        os.execve(sys.executable, [sys.executable, str(ROOT / "featx.py"), *arguments], known)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while chunk := os.read(descriptor, 65536):
            seen += chunk
    os.close(descriptor)
    assert os.waitpid(child, 0)[1] == 0, seen
    return seen.decode().replace("\r\n", "\n")


def without_progress(seen: str) -> str:
    """What is left when all that a slow machine had to say was wiped away."""
    return seen.split("\r\033[K")[-1]


def test_tables_fit_the_terminal_and_have_a_bold_header(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = pytest.importorskip("torchvision.models")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    seen = on_a_terminal(["torchvision.models:resnet18"], 60)
    lines = without_progress(seen).splitlines()
    assert re.search(r"\033\[1mname .* note\033\[0m", lines[0])
    plain = [re.sub(r"\033\[\d*[mK]", "", line) for line in lines]
    assert max(map(len, plain)) <= 60
    assert any("…" in line for line in plain)
    assert len(plain) == 1 + len(featx.get_graph_node_names(zoo.resnet18()).eval)
    wide = on_a_terminal(["torchvision.models:resnet18"], 200)
    assert "…" not in without_progress(wide)
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\033[1m" not in on_a_terminal(["torchvision.models:resnet18"], **environment)
    assert "\033[" not in run("torchvision.models:resnet18").stdout


def test_progress_is_shown_after_two_seconds_and_wiped_away(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom torch import nn\ndef model():\n    time.sleep(3.5)\n    return nn.Sequential(nn.ReLU())\n"
    )
    seen = on_a_terminal(["slow:model"], cwd=tmp_path)
    assert re.search(r"\rbuilding the model … 2 s.*\r\033\[K", seen)
    assert "tracing …" not in seen
    command = [sys.executable, str(ROOT / "featx.py"), "slow:model"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr == ""
