#!/usr/bin/env bash
# Distil by the command line: convert, train, measure, and continue a prompt.
#
#   docs/examples/distil.sh TEACHER TEXT OUT [options of flacompile distill]
#
#   docs/examples/distil.sh tests/teacher tests/teacher/train.txt out --mixer simple_gla --minutes 2
set -euo pipefail
teacher=$1 text=$2 out=$3

flacompile distill "$teacher" "$text" "$out" "${@:4}"
flacompile generate "$out" --prompt "Return the " --tokens 8
