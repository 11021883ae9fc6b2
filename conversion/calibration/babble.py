"""Sound like speech that says nothing, for models that hear and are given no recordings.

Syllables of a voice (harmonics of a falling pitch under the envelope of three formants that glide from vowel to vowel)
with hisses and stops between them and pauses after a few: the source-filter model of speech (Fant 1960).

Shapes: T samples, K harmonics, S control points, 100 a second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONTROL = 100
#: lowest and highest of the first three formants, and how wide they are, in Hz
FORMANTS = ((250.0, 850.0, 80.0), (800.0, 2300.0, 110.0), (2200.0, 3200.0, 160.0))


def babble(seconds: float, rate: int, draw: torch.Generator) -> Tensor:
    """Sound [T], fp32, loudest at about 0.5.

    Args:
        rate: samples a second.
        draw: decides the voice and what it babbles.
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    count = max(2, round(seconds * CONTROL))
    voiced, hiss = torch.zeros(count), torch.zeros(count)
    formants = torch.empty(count, 3)
    place, vowel = 0, [between(low, high) for low, high, _ in FORMANTS]
    left = 0
    while place < count:
        kind, before = between(0, 1), round(CONTROL * between(0.03, 0.12))
        if left == 0:
            left, kind = 3 + int(between(0, 5)), 1.0
            before = round(CONTROL * between(0.1, 0.5))
        left -= 1
        if kind < 0.45:  # a hiss; else a stop, or a pause
            hiss[place : place + before] = between(0.2, 1.0)
        length = round(CONTROL * between(0.08, 0.25))
        target = [between(low, high) for low, high, _ in FORMANTS]
        turn = torch.linspace(0, 1, before + length)[: max(0, count - place), None]
        formants[place : place + before + length] = torch.tensor(vowel) * (1 - turn) + torch.tensor(target) * turn
        loud = torch.hann_window(length + 2, periodic=False)[1:-1].sqrt() * between(0.5, 1.0)
        end = place + before + length
        voiced[place + before : end] = loud[: max(0, count - place - before)]
        place, vowel = end, target
    pitch = between(85, 230) * torch.linspace(between(1.0, 1.25), between(0.75, 1.0), count)
    pitch = pitch * (1 + 0.05 * torch.sin(torch.arange(count) * between(0.02, 0.08)))
    T = round(seconds * rate)
    sound = _voice(_stretched(pitch, T), _stretched(voiced, T), _stretched(formants.T, T), rate)
    sound = sound / sound.abs().max().clamp_min(1e-6) + 0.25 * _hisses(_stretched(hiss, T), rate, draw)
    sound = sound + 1e-3 * torch.randn(T, generator=draw)
    return 0.5 * sound / sound.abs().max().clamp_min(1e-6)


def _stretched(control: Tensor, T: int) -> Tensor:
    """Control points [..., S] as samples [..., T], in straight lines."""
    flat = control.reshape(1, -1, control.shape[-1])
    return torch.nn.functional.interpolate(flat, T, mode="linear", align_corners=True).reshape(*control.shape[:-1], T)


def _voice(pitch: Tensor, loud: Tensor, formants: Tensor, rate: int) -> Tensor:
    """[T]: harmonics of ``pitch`` [T], each as loud as the resonances at ``formants`` [3, T] make it."""
    phase = 2 * math.pi * torch.cumsum(pitch.double(), 0) / rate
    sound = torch.zeros_like(pitch)
    for k in range(1, int(min(4000, rate / 2) / float(pitch.min())) + 1):
        frequency = k * pitch
        gain = torch.zeros_like(pitch)
        for formant, (_, _, width) in zip(formants, FORMANTS, strict=True):
            gain += 1 / (1 + ((frequency - formant) / width).square())
        gain *= (frequency < 0.45 * rate) / (1 + frequency / 500)  # a voice's own slope
        sound += gain * torch.sin(k * phase).float()
    return sound * loud


def _hisses(loud: Tensor, rate: int, draw: torch.Generator) -> Tensor:
    """[T]: noise above 2 to 5 kHz, as far as the rate goes."""
    spectrum = torch.fft.rfft(torch.randn(len(loud), generator=draw))
    frequency = torch.linspace(0, rate / 2, len(spectrum))
    edge = min(2000 + 3000 * float(torch.rand((), generator=draw)), rate / 4)
    return torch.fft.irfft(spectrum * torch.sigmoid((frequency - edge) / 200), n=len(loud)) * loud
