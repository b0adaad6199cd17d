"""A real vLLM engine on the CPU, inside the test's process. Without vLLM files skip themselves; the end says so."""

import importlib.util
import os

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None

if HAS_VLLM and not os.environ.get("HYLO_TEST_GPU"):
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM compiles its sampler at first use, for longer than these tests take.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not HAS_VLLM:
        terminalreporter.write_line(
            "tests/serve: vLLM is not installed, no engine was started: pip install '.[serve-cpu]'"
        )
