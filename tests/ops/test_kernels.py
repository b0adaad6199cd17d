"""The choice of kernels, and what it says where there is none to be had."""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hylo.ops.kernels
from hylo.errors import HyLoError, HyLoWarning
from hylo.ops.gated_delta_rule import gated_delta_net
from hylo.ops.gated_linear_attention import gated_linear_attention
from hylo.ops.kernels import (
    _problem,
    _triton_problem,
    chosen_kernels,
    kernels,
    set_kernels,
    use_fla,
    will_differentiate,
)
from hylo.ops.kimi_delta_rule import kimi_delta_attention

HALF = torch.zeros(1, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins without a choice, and leaves none."""
    monkeypatch.delenv("HYLO_KERNELS", raising=False)
    monkeypatch.setattr(hylo.ops.kernels, "_choice", None)
    _triton_problem.cache_clear()
    yield
    _triton_problem.cache_clear()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Makes Triton seem to be of a version, or not installed."""

    def seem(version: str | None) -> None:
        def version_of(name: str) -> str:
            assert name == "triton"
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", version_of)

    return seem


def test_set_wins_over_the_environment_and_that_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_kernels() == "auto"
    monkeypatch.setenv("HYLO_KERNELS", "reference")
    assert chosen_kernels() == "reference"
    set_kernels("fla")
    assert chosen_kernels() == "fla"


def test_block_restores_what_was_chosen() -> None:
    with kernels("reference"):
        assert chosen_kernels() == "reference"
        with kernels("fla"):
            assert chosen_kernels() == "fla"
        assert chosen_kernels() == "reference"
    assert chosen_kernels() == "auto"
    set_kernels("fla")
    with pytest.raises(KeyError), kernels("reference"):
        raise KeyError
    assert chosen_kernels() == "fla"


def test_unknown_name_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "'triton'; expected one of auto, fla, reference"
    with pytest.raises(HyLoError, match=expected):
        set_kernels("triton")
    with pytest.raises(HyLoError, match=expected), kernels("triton"):
        pass
    assert chosen_kernels() == "auto"
    monkeypatch.setenv("HYLO_KERNELS", "triton")
    with pytest.raises(HyLoError, match=expected):
        chosen_kernels()


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_the_cpu_has_the_reference_without_a_word(choice: str) -> None:
    with kernels(choice), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_fla(HALF, gated_backward=True)


def test_fla_on_the_cpu_is_refused() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with kernels("fla"), pytest.raises(HyLoError, match=r"runs on a GPU.*on cpu"):
        gated_linear_attention(x, x, x, x[..., 0])


def test_float32_on_a_gpu_is_a_problem() -> None:
    problem = _problem(torch.device("cuda"), torch.float32, False)
    assert problem is not None
    assert "bfloat16 or float16, the tensors are float32" in problem


def test_missing_fla_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = _problem(torch.device("cuda"), torch.bfloat16, False)
    assert problem is not None
    assert "not installed; install it with: pip install" in problem


@pytest.mark.parametrize(
    ("version", "capability", "refused"),
    [
        ("3.3.1", (9, 0), False),
        ("3.4.0", (9, 0), True),
        ("3.6.0", (9, 0), True),
        ("3.7.0", (9, 0), True),
        ("3.7.1", (9, 0), False),
        ("3.10.0", (9, 0), False),
        ("3.6.0", (8, 0), False),
        ("3.6.0", (10, 0), False),
    ],
)
def test_triton_that_computes_wrong_gradients_on_hopper(
    triton: Callable[[str | None], None], version: str, capability: tuple[int, int], refused: bool
) -> None:
    triton(version)
    problem = _triton_problem(capability)
    assert (problem is not None) == refused
    if problem is not None:
        assert version in problem
        assert "triton>=3.7.1" in problem


def test_missing_triton_says_what_to_install(triton: Callable[[str | None], None]) -> None:
    triton(None)
    problem = _triton_problem((9, 0))
    assert problem is not None
    assert "not installed; install it with: pip install 'triton>=3.7.1'" in problem


def test_will_differentiate() -> None:
    leaf = torch.zeros(1, requires_grad=True)
    assert will_differentiate(HALF, None, leaf)
    assert not will_differentiate(HALF, None)
    with torch.no_grad():
        assert not will_differentiate(leaf)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, triton: Callable[[str | None], None]) -> Iterator[None]:
    """A Hopper GPU with fla and a Triton that computes wrong gradients; its tensors have no values."""
    triton("3.6.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    hylo.ops.kernels._warn_once.cache_clear()
    with FakeTensorMode():
        yield


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True)


@pytest.mark.usefixtures("hopper")
def test_auto_warns_once_and_takes_the_reference() -> None:
    with pytest.warns(HyLoWarning, match=r"Hopper.*triton>=3\.7\.1.*plain torch is used"):
        assert not use_fla(on_gpu(1), gated_backward=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_fla(on_gpu(1), gated_backward=True)
        assert use_fla(on_gpu(1)), "without a gated backward pass there is nothing wrong"
        assert not use_fla(on_gpu(1, dtype=torch.float32), gated_backward=True), "exactness needs no warning"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", ["gdn", "gla"])
def test_fla_stops_where_gradients_would_be_wrong(op: str) -> None:
    x, head = on_gpu(1, 2, 1, 4), on_gpu(1, 2, 1)
    with kernels("fla"), pytest.raises(HyLoError, match=r"Hopper.*triton>=3\.7\.1"):
        if op == "gdn":
            gated_delta_net(x, x, x, head, head, on_gpu(1), on_gpu(1))
        else:
            gated_linear_attention(x, x, x, head)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", ["gdn", "kda"])
def test_fla_stops_at_keys_that_it_does_not_take(op: str, triton: Callable[[str | None], None]) -> None:
    triton("3.7.1")
    x, head = on_gpu(1, 2, 1, 257), on_gpu(1, 2, 1)
    with kernels("fla"), pytest.raises(HyLoError, match="keys of at most 256, these have 257"):
        if op == "gdn":
            gated_delta_net(x, x, x, head, head, on_gpu(1), on_gpu(1))
        else:
            kimi_delta_attention(x, x, x, x, head, on_gpu(1), on_gpu(257))
    with pytest.warns(HyLoWarning, match="these have 257"):
        assert not use_fla(x, delta_keys=257)
