"""What depends on a position: rotary frequencies and their stretchings (linear; YaRN, 2309.00071; Llama 3, as in
Transformers' modeling_rope_utils), and the temperature of queries.
"""

from __future__ import annotations

import math

import torch

from tandem.models.spec import ModelSpec, QueryTemperature, RopeScaling


def _llama3(frequency_D: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Low frequencies divided by factor, high ones kept, the band between interpolated."""
    length = scaling.original_max_position
    wavelength = 2 * math.pi / frequency_D
    low, high = length / scaling.low_freq_factor, length / scaling.high_freq_factor
    stretched = torch.where(wavelength > low, frequency_D / scaling.factor, frequency_D)
    smooth = (length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((wavelength >= high) & (wavelength <= low), between, stretched)


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(spec: ModelSpec, scaling: RopeScaling, frequency_D: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Interpolate by rotations within the trained length; scale cos and sin by the attention factor."""
    size, length = spec.head_size, scaling.original_max_position

    def dimension(rotations: float) -> float:
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = frequency_D / scaling.factor * ramp + frequency_D * (1 - ramp)
    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        factor = _yarn_mscale(scaling.factor, scaling.mscale) / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        return frequencies, factor
    return frequencies, _yarn_mscale(scaling.factor)


def rope_tables(spec: ModelSpec, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [positions, D / 2] in fp32."""
    size = spec.head_size
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequency_D = 1.0 / (spec.rope_theta**exponents)
    scaling, factor = spec.rope_scaling, 1.0
    if scaling is not None:
        if scaling.kind == "linear":
            frequency_D = frequency_D / scaling.factor
        elif scaling.kind == "llama3":
            frequency_D = _llama3(frequency_D, scaling)
        else:
            frequency_D, factor = _yarn(spec, scaling, frequency_D)
    angle_PD = torch.outer(torch.arange(positions, dtype=torch.float32), frequency_D)
    return angle_PD.cos() * factor, angle_PD.sin() * factor


def query_factors(temperature: QueryTemperature, positions: int) -> torch.Tensor:
    """[positions] in fp32, each rounded from fp64: what the query at a position is multiplied by."""
    floor = temperature.floor
    steps = [temperature.factor(step * floor - 1) for step in range(positions // floor + 1)]
    return torch.tensor(steps)[torch.arange(1, positions + 1) // floor]
