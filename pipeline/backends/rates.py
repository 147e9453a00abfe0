"""What GPUs can compute and move at best, as NVIDIA states it; GPUs that are not in the table have no figures."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Of one GPU.

    Attributes:
        operations: per second and precision, dense (without sparsity); a multiply-accumulate is two.
        bandwidth: bytes per second of GPU memory.
        source: where the figures are from.
    """

    operations: dict[str, float]
    bandwidth: float
    source: str


# The data sheets give tensor cores' rates with sparsity: dense ones are half. fp32: without tensor cores.
HOPPER_SXM = {"int8": 1979e12, "fp16": 989e12, "bf16": 989e12, "tf32": 494e12, "fp32": 67e12}
# By CUDA's name of the GPU and its compute capability: other boards of one chip are slower.
TABLE: Mapping[tuple[str, str], Rates] = {
    ("NVIDIA H200", "9.0"): Rates(HOPPER_SXM, 4.8e12, "NVIDIA H200 data sheet, SXM, dense"),
    ("NVIDIA H100 80GB HBM3", "9.0"): Rates(HOPPER_SXM, 3.35e12, "NVIDIA H100 data sheet, SXM5, dense"),
}


def rates_of(name: str, compute_capability: str) -> Rates | None:
    """The figures of a GPU; None where they are unknown."""
    return TABLE.get((name, compute_capability))
