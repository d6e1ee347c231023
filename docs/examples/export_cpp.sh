#!/usr/bin/env bash
# Export a model, build the C++ runner, and run the package without Python.
#
#   docs/examples/export_cpp.sh MODEL PACKAGE BUILD
#
#   docs/examples/export_cpp.sh out out/model.pt2 build
#
# MODEL is a folder written by flacompile convert or distill. What is there already is not made
# again: the package, and the programs in BUILD.
set -euo pipefail
model=$1 package=$2 build=$3
runner=$(cd "$(dirname "$0")/../../runner" && pwd)

[ -e "$package" ] || flacompile export "$model" "$package"
if [ ! -e "$build/generate" ]; then
    torch=$(python -c 'import torch; print(torch.__path__[0])')
    cmake -S "$runner" -B "$build" -DCMAKE_PREFIX_PATH="$torch"
    cmake --build "$build"
fi
"$build/generate" "$package" --ids 2,57,31,12 --tokens 8
