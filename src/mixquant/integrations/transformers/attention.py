"""Which of torch's attention kernels forwards of changing lengths may take: any but cuDNN's.

On Hopper and Blackwell with a recent cuDNN, torch tries cuDNN's first (2.11 and 2.13 do). It builds an execution plan
for each batch size and key length, which takes the host tens of milliseconds, and keeps it as long as the thread lives.
Where lengths recur, that is paid once. But the evaluator's batches have another length in nearly every forward, and an
answer that is written has another one at each token: each forward would build a plan that hardly any other uses, host
memory would grow without a bound, and a printed time would be that of building plans.

Trade-off: once its plan is there, cuDNN's kernel may be faster than those that run in its place, FlashAttention and,
with a mask, the memory-efficient one. What is gained or lost has not been timed. A benchmark's static cache and
calibration's sequences have constant lengths and keep torch's order, and so do forwards that users call themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let torch's attention run on any kernel but cuDNN's, and put back what was; also a decorator.

    All threads share torch's switch. The other kernels' switches are not touched: what was off stays off.
    """
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)
