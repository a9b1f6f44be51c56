"""Peak speed of known GPUs, for MFU."""

from __future__ import annotations

_NAMES_BY_TFLOPS: dict[float, tuple[str, ...]] = {
    2500.0: ("NVIDIA GB200",),
    2250.0: ("NVIDIA B200", "NVIDIA B300 SXM6 AC"),
    989.4: (
        *("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H800"),
        *("NVIDIA GH200 480GB", "NVIDIA GH200 120GB", "NVIDIA GH200 144G HBM3e"),
    ),
    835.5: ("NVIDIA H100 NVL", "NVIDIA H200 NVL"),
    756.0: ("NVIDIA H100 PCIe", "NVIDIA H800 PCIe"),
    148.0: ("NVIDIA H20",),
    312.0: (
        *("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-64GB"),
        *("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe"),
    ),
    165.0: ("NVIDIA A30",),
    149.7: ("NVIDIA A40",),
    125.0: ("NVIDIA A10", "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"),
    70.0: ("NVIDIA A10G",),
    362.1: ("NVIDIA L40S",),
    181.0: ("NVIDIA L40", "AMD Instinct MI210", "AMD Instinct MI250"),
    121.0: ("NVIDIA L4",),
    119.5: ("NVIDIA L20",),
    130.0: ("Tesla V100S-PCIE-32GB",),
    112.0: ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
    65.0: ("Tesla T4",),
    364.2: ("NVIDIA RTX 6000 Ada Generation",),
    154.8: ("NVIDIA RTX A6000",),
    209.5: ("NVIDIA GeForce RTX 5090",),
    112.6: ("NVIDIA GeForce RTX 5080",),
    87.9: ("NVIDIA GeForce RTX 5070 Ti",),
    61.7: ("NVIDIA GeForce RTX 5070",),
    47.4: ("NVIDIA GeForce RTX 5060 Ti",),
    38.4: ("NVIDIA GeForce RTX 5060",),
    165.2: ("NVIDIA GeForce RTX 4090",),
    104.4: ("NVIDIA GeForce RTX 4080 SUPER",),
    97.5: ("NVIDIA GeForce RTX 4080",),
    88.2: ("NVIDIA GeForce RTX 4070 Ti SUPER",),
    80.2: ("NVIDIA GeForce RTX 4070 Ti",),
    71.0: ("NVIDIA GeForce RTX 4070 SUPER",),
    58.3: ("NVIDIA GeForce RTX 4070",),
    44.1: ("NVIDIA GeForce RTX 4060 Ti",),
    30.2: ("NVIDIA GeForce RTX 4060",),
    80.0: ("NVIDIA GeForce RTX 3090 Ti",),
    71.2: ("NVIDIA GeForce RTX 3090",),
    68.2: ("NVIDIA GeForce RTX 3080 Ti",),
    59.5: ("NVIDIA GeForce RTX 3080",),
    43.5: ("NVIDIA GeForce RTX 3070 Ti",),
    40.6: ("NVIDIA GeForce RTX 3070",),
    32.4: ("NVIDIA GeForce RTX 3060 Ti",),
    25.5: ("NVIDIA GeForce RTX 3060",),
    191.5: ("AMD Instinct MI250X",),
    980.6: ("AMD Instinct MI300A",),
    1307.4: ("AMD Instinct MI300X", "AMD Instinct MI300X VF", "AMD Instinct MI325X"),
}
PEAK_TFLOPS: dict[str, float] = {}
for _tflops, _names in _NAMES_BY_TFLOPS.items():
    PEAK_TFLOPS |= dict.fromkeys(_names, _tflops)
"""TFLOP/s of one device in dense bf16 (fp16 before Ampere), without sparsity and with sums in fp32, by the driver's name.

NVIDIA: the data sheets of H100, H200, H20, GH200, HGX B200, HGX B300, GB200 NVL72, A100, A30, A40, A10, A10G, L4, L20,
L40, L40S, T4, V100, RTX A6000 and RTX 6000 Ada, halved where a sheet gives the sparse figure; the white papers "Ampere
GA102", "Ada" and "RTX Blackwell" for GeForce, where sums in fp32 run at half the rate (twice the plain fp32 figure of the
card). For L4, L40S and RTX 6000 Ada the sheets leave open whether sums are in fp32: their figures may be twice the truth.
AMD: the data sheets of MI210, MI250, MI250X, MI300A, MI300X and MI325X; a MI250 or MI250X is two devices, with half each.
The files of conf/hardware say for their cards what was looked up where; the others were not looked up again.
"""


def peak_tflops(name: str) -> float | None:
    """Peak TFLOP/s of the GPU that its driver calls exactly `name`; None for an unknown one, or a part of a GPU (MIG)."""
    return PEAK_TFLOPS.get(name.strip())
