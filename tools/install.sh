#!/usr/bin/env bash
# Makes the virtual environment VENV with a mix of torch, fbgemm and torchrec that fits together: the one below, or
# another in TORCH, FBGEMM and TORCHREC.
#
# torchrec requires the distribution fbgemm-gpu, the CUDA build: on a machine without a CUDA GPU the CPU build
# fbgemm-gpu-cpu takes its place, and torchrec is installed without its requirements, which follow by name.
set -euo pipefail

: "${PYTHON:=python3}" "${VENV:=.venv}" "${TORCH_PIP_ARGS:=}"
: "${TORCH:=2.13.0}" "${FBGEMM:=1.8.0}" "${TORCHREC:=1.8.0}"
# For a torch without CUDA, which brings no Triton: the release that the same torch with CUDA requires.
TRITON=3.7.0

say() { printf '%s\n' "$*" >&2; }

if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv "$VENV" || { say "error: $PYTHON cannot make a virtual environment; install its venv package"; exit 2; }
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  fbgemm="fbgemm-gpu==$FBGEMM"
else
  fbgemm="fbgemm-gpu-cpu==$FBGEMM"
fi

say "installing torch $TORCH, ${fbgemm/==/ } and torchrec $TORCHREC into $VENV"
# shellcheck disable=SC2086  # the arguments are words
pip install --quiet $TORCH_PIP_ARGS "torch==$TORCH"
pip install --quiet "$fbgemm" "torch==$TORCH"
# ninja builds the C++ operators in parallel.
pip install --quiet "torch==$TORCH" tensordict "torchmetrics==1.0.3" tqdm pyre-extensions iopath setuptools wheel ninja
# Triton comes with CUDA builds of torch; on CPU its interpreter runs the tests.
if [ "$(uname -s)" = Linux ] && ! "$VENV/bin/python" -c 'import triton' 2>/dev/null; then
  pip install --quiet "torch==$TORCH" "triton==$TRITON"
fi
# Without the operators, which `make` builds in place and again whenever their sources change.
TORCHREC_MPE_NO_KERNELS=1 pip install --quiet --no-build-isolation -e ".[dev]"
# Last: after it, pip would report the missing fbgemm-gpu at every install.
pip install --quiet --no-deps "torchrec==$TORCHREC"
