"""Sums of metrics, reduced over processes once per step."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.types import Metrics


class MetricSums:
    """Collects (sum, count) pairs on the device, without synchronising; `reduce` adds and divides, in one collective."""

    def __init__(self) -> None:
        self._added: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, metrics: Metrics) -> None:
        """metrics: name -> (sum, count), scalars. `reduce` adds them up, so that this call computes nothing."""
        for name, (total, count) in metrics.items():
            totals, counts = self._added.setdefault(name, ([], []))
            totals.append(total.detach())
            counts.append(count.detach())

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """name -> sum / count over all processes; a name whose global count is 0 is left out (it has no mean).

        Calls `all_sum` exactly once (not at all if nothing was added). Every process must have added the same names.
        """
        names = sorted(self._added)
        if not names:
            return {}
        fingerprint = float(zlib.crc32("\n".join(names).encode()) >> 12)  # 20 bits, so that sums of it are exact
        sums = [_wide(torch.stack(values)).sum() for name in names for values in self._added[name]]
        head = sums[0].new_tensor([1.0, fingerprint])
        processes, fingerprints, *flat = all_sum(torch.cat([head, torch.stack(sums)])).tolist()
        assert fingerprints == fingerprint * processes, f"processes reduce different metrics; this one has {names}"
        pairs = zip(names, flat[::2], flat[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count != 0}


def _wide(values: Tensor) -> Tensor:
    """In float64, so that results hardly depend on microbatch sizes; in float32 on MPS, which has no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
