#!/usr/bin/env bash
# Tests and benchmarks on a GPU, in at most eight minutes: benchmarks/gpu.sh [--device cpu] [--quick] [FOLDER]
#
# It needs the torch, torchvision, pytest, pytest-benchmark and hypothesis of the python on the path, and no git. FOLDER,
# gpu-results if none is given, gets <machine>.json, and the plots if matplotlib is there; the tables are printed. The
# READMEs are filled from the JSON alone. --quick takes two models, to try all this: with --device cpu on any machine.
set -euo pipefail

usage() {
    echo "gpu.sh: $1; benchmarks/gpu.sh [--device cpu] [--quick] [FOLDER]" >&2
    exit 2
}

device=cuda
folder=gpu-results
part=()
while (($#)); do
    case $1 in
    --device)
        (($# > 1)) || usage "--device is cpu or cuda"
        device=$2
        shift
        ;;
    --quick) part=(-k "(resnet and not usual and not compiled) or training") ;;
    -*) usage "there is no option $1" ;;
    *) folder=$1 ;;
    esac
    shift
done
[[ $device == cpu || $device == cuda ]] || usage "--device is cpu or cuda, and not $device"
folder=$(realpath --canonicalize-missing "$folder")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What torch warns of itself on a machine that nobody has seen is no failure.
tests=(tests/test_device.py tests/test_cli.py::test_device)
failed=0
FEATX_DEVICE=$device timeout 200 python -m pytest -q -rs -W default "${tests[@]}" || failed=$?

# A benchmark lasts 20 seconds at most, a compiled one a minute.
benchmarks=(benchmarks/bench_forward.py benchmarks/bench_stages.py)
options=(--override-ini "python_files=bench_*.py" --benchmark-quiet --device "$device" --save-to "$folder")
python -m pytest -q "${benchmarks[@]}" "${options[@]}" --until $((400 - SECONDS)) ${part[@]+"${part[@]}"}
python -m benchmarks.plot "$folder"
echo "gpu.sh: $SECONDS seconds; the results are in $folder"
if ((failed)); then
    echo "gpu.sh: the tests failed, or had no time left: see above" >&2
    exit 1
fi
