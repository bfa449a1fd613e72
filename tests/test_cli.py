"""The command line, through real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from tests import featx

ROOT = Path(__file__).parent.parent
PHOTOGRAPH = ROOT / "tests" / "data" / "grace_hopper.jpg"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "featx", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_features_of_a_photograph() -> None:
    table = rows(run("torchvision.models:resnet18", "--image", str(PHOTOGRAPH), "layer1", "layer4=deep"))
    assert table[0] == ["key", "shape", "dtype", "mean", "std", "min", "max"]
    assert [row[:3] for row in table[1:]] == [["layer1", "1x64x56x56", "float32"], ["deep", "1x512x7x7", "float32"]]
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    with torch.no_grad():
        deep = featx.create_feature_extractor(model, ["layer4"])(featx._read_image(str(PHOTOGRAPH)))["layer4"]
    assert float(table[2][3]) == pytest.approx(float(deep.mean()), rel=1e-3)
    assert float(table[2][6]) == pytest.approx(float(deep.max()), rel=1e-3)


def test_the_photograph_is_prepared_as_torchvisions_presets_do() -> None:
    from PIL import Image
    from torchvision.transforms._presets import ImageClassification

    with Image.open(PHOTOGRAPH) as file:
        theirs = ImageClassification(crop_size=224)(file.convert("RGB"))
    ours = featx._read_image(str(PHOTOGRAPH))[0]
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_table_of_nodes() -> None:
    table = rows(run("torchvision.models:resnet18"))
    assert table[0] == ["name", "operation", "target", "shape", "note"]
    assert table[2] == ["conv1", "call_module", "Conv2d"]
    assert [row[0] for row in table[1:]] == featx.get_graph_node_names(torchvision.models.resnet18()).eval


def test_table_with_shapes_and_notes() -> None:
    options = ["--kwargs", '{"init_weights": false}', "--input", "1,3,64,64"]
    table = rows(run("torchvision.models:googlenet", *options))
    shapes = {row[0]: row[3] for row in table[1:] if len(row) == 4}
    assert shapes["conv1.conv"] == "1x64x32x32"
    notes = {row[0] for row in table if row[-2:] == ["train", "only"]}
    names = featx.get_graph_node_names(torchvision.models.googlenet(init_weights=False), suppress_diff_warning=True)
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
        (["torchvision.models:nope"], "no callable 'nope'"),
        (["no_such_package:x"], "No module named 'no_such_package'"),
        (["torch:__version__"], "no callable"),
        (["builtins:dict"], "gives dict, not a torch.nn.Module"),
        (["torchvision.models:resnet18", "layer1"], "needs --image FILE or --input"),
        (["torchvision.models:resnet18", "layr1", "--input", "1,3,64,64"], "The closest: 'layer1'"),
        (["torchvision.models:resnet18", "layer1", "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["torchvision.models:resnet18", "layer1", "--image", "featx.py"], "cannot identify image file"),
        (["torchvision.models:resnet18", "--kwargs", "{x"], "is no JSON"),
        (["torchvision.models:resnet18", "--kwargs", "[1]"], "takes a JSON object"),
        (["torchvision.models:resnet18", "--kwargs", '{"nope": 1}'], "nope"),
        (["torchvision.models:resnet18", "--input", "big"], "takes sizes such as 1,3,224,224"),
        (["torchvision.models:resnet18", "layer1", "--input", "3"], "input"),
        (["torchvision.models:vit_b_32", "conv_proj", "--input", "1,3,64,64"], "image height"),
        (["torchvision.models:resnet18", "--no-such-option"], "--no-such-option"),
        (["torchvision.models.optical_flow:raft_small"], "cannot trace the model's own forward"),
        ([], "required"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("featx: error: ")
    assert len(done.stderr.splitlines()) == 1


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
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_help_and_version() -> None:
    assert run("--version").stdout.strip() == featx.__version__
    assert "PACKAGE.MODULE:CALLABLE" in run("--help").stdout
