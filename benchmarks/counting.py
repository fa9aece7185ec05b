"""What a step must do at least: its multiply-adds, and what it keeps for the backward pass.

torch counts dense products. Sparse ones count here by their stored entries, and the fused attention and LSTM
of a CPU by the products within them; what is element by element is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

_SIZE, _COPIED, _TRIALS = 1536, 2**28, 8


class Work(NamedTuple):
    """What a step does at least."""

    flops: int
    """Of its products, two for a multiply-add."""
    kept: int
    """Bytes that the forward pass keeps for the backward pass, each once, without the parameters."""


class Pace(NamedTuple):
    """What a machine does at most."""

    flops: float
    """Of a large float32 matrix product [1/s]."""
    memory: float
    """Read and written by a large copy [bytes/s]."""

    def floor(self, work: Work) -> float:
        """Seconds below which a step cannot be: products, or writing and reading once what is kept."""
        return max(work.flops / self.flops, 2 * work.kept / self.memory)


def count(step: Callable[[], None], parameters: Iterable[Tensor]) -> Work:
    """Runs a step and counts."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return Work(int(counter.get_total_flops()), sum(size for place, size in kept.items() if place not in own))


def pace(threads: int) -> Pace:
    """The best of some trials on this machine."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, _SIZE, _SIZE)
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b))
    return Pace(2 * _SIZE**3 / product, 2 * _COPIED / _best(lambda: target.copy_(source)))


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some trials."""
    times = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _product(left: Tensor, right: Tensor, **_: Any) -> int:
    entries = left.numel() if left.layout == torch.strided else left._nnz()
    return 2 * entries * right.shape[1]


def _sampled_product(entries: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return 2 * entries._nnz() * left.shape[1]


def _bag(table: Tensor, index: Tensor, *_: Any, **__: Any) -> int:
    return 2 * len(index) * table.shape[1]


def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 2 * 2 * query.numel() * key.shape[-2]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 5 * 2 * query.numel() * key.shape[-2]  # scores once more, and the gradients of four factors


def _lstm(steps: Tensor, inputs: Tensor, state: Tensor, *_: Any, **__: Any) -> int:
    return 2 * steps.shape[0] * steps.shape[1] * (inputs.numel() + state.numel())


def _lstm_backward(*tensors: Any, **_: Any) -> int:
    return 2 * _lstm(*tensors)


_aten = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    _aten.mm: _product,
    _aten.sparse_sampled_addmm: _sampled_product,
    _aten._embedding_bag: _bag,
    _aten._embedding_bag_forward_only: _bag,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _lstm,
    _aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
for _formula in set(_FORMULAS.values()):
    _formula._get_raw = True  # the counter gives it tensors, not their shapes alone
