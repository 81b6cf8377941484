"""The hot loops as plain functions that numba compiles; `numpy_kernels` documents each.

They run without the interpreter lock and without numba's own threads: callers split the work.
Nothing here may be compiled with `fastmath`: the order of every sum is part of the contract.
`number`, `widest_vectors` and `ask_for` are what `numba_extensions` makes of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "abs_sums",
    "ask_for",
    "best_prefix",
    "best_quad",
    "cells",
    "coded_sums",
    "codes",
    "fold",
    "histogram",
    "number",
    "sorted_cells",
    "squared_sums",
    "total",
    "two_bit",
    "unfolds",
    "widest_vectors",
]

LANES = 64
_STEP = 256


def number(stored: Any) -> Any:
    """A weight as a number: uint16 is the bits of a bfloat16, all others are themselves."""
    raise NotImplementedError


def widest_vectors() -> None:
    """Compile the loop that says so for the widest vectors that the processor has."""
    raise NotImplementedError


def ask_for(x: Any, begin: int, end: int) -> None:
    """Bring what x[begin:end] would read, _AHEAD numbers later, towards the processor.

    It looks ahead by itself no further than to the end of a page, and waits at the next one.
    """
    raise NotImplementedError


def total(lanes: Any) -> Any:
    """The sum of LANES numbers, by halves; they are written over."""
    width = LANES // 2
    while width > 0:
        for j in range(width):
            lanes[j] += lanes[j + width]
        width //= 2
    return lanes[0]


def abs_sums(x: Any, out: Any) -> None:
    """See `numpy_kernels.abs_sums`."""
    widest_vectors()
    first = np.empty(LANES, dtype=np.float64)
    second = np.empty(LANES, dtype=np.float64)
    length = x.shape[1]
    half = length // (2 * LANES) * LANES
    for unit in range(x.shape[0]):
        row = x[unit]
        first[:] = 0.0
        second[:] = 0.0
        for i in range(0, half, LANES):  # two streams: one alone does not saturate the memory
            step = row[i : i + LANES]  # a slice of known length is what LLVM vectorizes
            far = row[half + i : half + i + LANES]
            ask_for(row, i, i + LANES)
            ask_for(row, half + i, half + i + LANES)
            for j in range(LANES):
                first[j] += abs(np.float64(number(step[j])))
            for j in range(LANES):
                second[j] += abs(np.float64(number(far[j])))
        for j in range(LANES):
            first[j] += second[j]
        for i in range(2 * half, length):
            first[(i - 2 * half) % LANES] += abs(np.float64(number(row[i])))
        out[unit] = total(first)


def codes(x: Any, cuts: Any, out: Any) -> None:
    """See `numpy_kernels.codes`."""
    widest_vectors()
    half = cuts.shape[1] // 2
    for unit in range(x.shape[0]):
        row, codes_row = x[unit], out[unit]
        low, high = cuts[unit, half - 1], cuts[unit, half]
        whole = x.shape[1] // _STEP * _STEP
        for i in range(0, whole, _STEP):
            step, to = row[i : i + _STEP], codes_row[i : i + _STEP]
            ask_for(row, i, i + _STEP)
            for j in range(_STEP):
                value = number(step[j])
                to[j] = np.int8(value > high) - np.int8(value < low)
        for i in range(whole, x.shape[1]):
            value = number(row[i])
            codes_row[i] = np.int8(value > high) - np.int8(value < low)
        for j in range(half - 1):
            low, high = cuts[unit, j], cuts[unit, half + 1 + j]
            for i in range(x.shape[1]):
                value = number(row[i])
                codes_row[i] += np.int8(value > high) - np.int8(value < low)


def cells(x: Any, cuts: Any, counts: Any, sums: Any) -> None:
    """See `numpy_kernels.cells`; counts and sums come in as zeros."""
    half = cuts.shape[1] // 2
    for unit in range(x.shape[0]):
        row = x[unit]
        for i in range(x.shape[1]):
            value = row[i]
            cell = half
            for j in range(half):
                cell += int(value > cuts[unit, half + j]) - int(value < cuts[unit, j])
            counts[unit, cell] += 1
            sums[unit, cell] += value


def histogram(bits: Any, x: Any, base: int, shift: int, counts: Any, sums: Any) -> None:
    """See `numpy_kernels.histogram`; bits are |x|'s float32 bits, counts and sums zeros."""
    last = counts.shape[0] - 1
    for i in range(x.shape[0]):
        index = min(max((np.int64(bits[i] & 0x7FFFFFFF) >> shift) - base, 0), last)
        counts[index] += 1
        sums[index] += np.float64(abs(x[i]))


def best_prefix(ascending: Any, best: Any, best_sum: Any) -> None:
    """See `numpy_kernels.best_prefix`."""
    length = ascending.shape[1]
    for unit in range(ascending.shape[0]):
        row = ascending[unit]
        total, top, k, top_sum = 0.0, -1.0, 0, 0.0
        for i in range(length):
            total += np.float64(row[length - 1 - i])
            gain = total * total / (i + 1)
            if gain > top:
                top, k, top_sum = gain, i + 1, total
        while k < length and row[length - 1 - k] == row[length - k]:
            top_sum += np.float64(row[length - 1 - k])
            k += 1
        best[unit], best_sum[unit] = k, top_sum


def best_quad(ordered: Any, scales: Any) -> None:
    """See `numpy_kernels.best_quad`."""
    length = ordered.shape[1]
    for unit in range(ordered.shape[0]):
        row = ordered[unit]
        top, found = -1.0, 0.0
        for sign in (1.0, -1.0):
            product, energy = 0.0, 0.0
            first, second = length - 1, length - 1
            while first >= 0 or second >= 0:
                while second >= 0 and not sign * np.float64(row[second]) > 0.0:
                    second -= 1
                if first < 0 and second < 0:
                    break
                of_first = abs(np.float64(row[first])) if first >= 0 else 0.0
                of_second = abs(np.float64(row[second])) if second >= 0 else 0.0
                if first >= 0 and (second < 0 or 3.0 * of_first >= of_second):
                    product += of_first
                    energy += 1.0
                    first -= 1
                else:
                    product += of_second
                    energy += 3.0
                    second -= 1
                gain = product * product / energy
                if gain > top:
                    top, found = gain, sign * product / energy
        scales[unit] = found


def sorted_cells(
    ascending: Any, prefix: Any, cuts: Any, n_low: int, counts: Any, sums: Any
) -> None:
    """See `numpy_kernels.sorted_cells`."""
    length, n_cuts = ascending.shape[1], cuts.shape[1]
    for unit in range(ascending.shape[0]):
        row = ascending[unit]
        last = 0
        for j in range(n_cuts):
            cut = cuts[unit, j]
            low, high = last, length
            while low < high:
                middle = (low + high) // 2
                left = row[middle] < cut if j < n_low else row[middle] <= cut
                if left:
                    low = middle + 1
                else:
                    high = middle
            counts[unit, j] = low - last
            sums[unit, j] = prefix[unit, low] - prefix[unit, last]
            last = low
        counts[unit, n_cuts] = length - last
        sums[unit, n_cuts] = prefix[unit, length] - prefix[unit, last]


def squared_sums(x: Any, values: Any, out: Any) -> None:
    """See `numpy_kernels.squared_sums`."""
    errors = np.zeros((2, LANES), dtype=np.float64)
    energies = np.zeros((2, LANES), dtype=np.float64)
    length = x.shape[0]
    half = length // (2 * LANES) * LANES
    for i in range(0, half, LANES):
        for stream in range(2):
            at = stream * half + i
            step, near = x[at : at + LANES], values[at : at + LANES]
            lane_errors, lane_energies = errors[stream], energies[stream]
            for j in range(LANES):
                truth = np.float64(step[j])
                error = truth - np.float64(near[j])
                lane_errors[j] += error * error
                lane_energies[j] += truth * truth
    for j in range(LANES):
        errors[0, j] += errors[1, j]
        energies[0, j] += energies[1, j]
    for i in range(2 * half, length):
        truth = np.float64(x[i])
        error = truth - np.float64(values[i])
        errors[0, (i - 2 * half) % LANES] += error * error
        energies[0, (i - 2 * half) % LANES] += truth * truth
    out[0], out[1] = total(errors[0]), total(energies[0])


def coded_sums(x: Any, trits: Any, factors: Any, length: int, out: Any) -> None:
    """See `numpy_kernels.coded_sums`."""
    widest_vectors()
    errors = np.zeros((2, LANES), dtype=np.float64)
    energies = np.zeros((2, LANES), dtype=np.float64)
    size = x.shape[0]
    half = size // (2 * LANES) * LANES
    for i in range(0, half, LANES):
        for stream in range(2):
            at = stream * half + i
            step, near = x[at : at + LANES], trits[at : at + LANES]
            factor = factors[at // length]
            ask_for(x, at, at + LANES)
            lane_errors, lane_energies = errors[stream], energies[stream]
            for j in range(LANES):
                truth = np.float64(number(step[j]))
                error = truth - np.float64(np.float32(near[j]) * factor)
                lane_errors[j] += error * error
                lane_energies[j] += truth * truth
    for j in range(LANES):
        errors[0, j] += errors[1, j]
        energies[0, j] += energies[1, j]
    for i in range(2 * half, size):
        truth = np.float64(number(x[i]))
        error = truth - np.float64(np.float32(trits[i]) * factors[i // length])
        errors[0, (i - 2 * half) % LANES] += error * error
        energies[0, (i - 2 * half) % LANES] += truth * truth
    out[0], out[1] = total(errors[0]), total(energies[0])


def fold(words: Any, out: Any) -> None:
    """See `numpy_kernels.fold`."""
    widest_vectors()
    low = np.uint32(0x7F7F7F7F)
    for i in range(words.shape[0]):
        levels = words[i]
        # 1 + level in each byte, without a carry into the next one
        word = ((levels & low) + np.uint32(0x01010101)) ^ (levels & ~low)
        word = word | word >> np.uint32(6) | word >> np.uint32(12) | word >> np.uint32(18)
        out[i] = np.uint8(word & np.uint32(255))


def unfolds(packed: Any, words: Any, n_levels: int, out: Any) -> None:
    """See `numpy_kernels.unfolds`."""
    widest_vectors()
    low = np.uint32(0x7F7F7F7F)
    code_3 = np.uint32(0x01010101 if n_levels == 3 else 0)
    differing = np.uint32(0)
    for i in range(words.shape[0]):
        word = np.uint32(packed[i])
        word = word | word << np.uint32(6) | word << np.uint32(12) | word << np.uint32(18)
        levels = words[i]
        codes = ((levels & low) + np.uint32(0x01010101)) ^ (levels & ~low)
        word = word & np.uint32(0x03030303)
        differing |= (word ^ codes) | (word & (word >> np.uint32(1)) & code_3)
    out[0] = differing == 0


def two_bit(x: Any, cut: Any, out: Any) -> None:
    """See `numpy_kernels.two_bit`."""
    widest_vectors()
    code = np.empty(_STEP, dtype=np.uint8)
    words = code.view(np.uint32)
    below = -cut
    half = x.shape[0] // (2 * _STEP)
    for k in range(2 * half):
        at = (k // 2 + k % 2 * half) * _STEP  # two streams, as in `abs_sums`
        step = x[at : at + _STEP]
        packed = out[at // 4 : (at + _STEP) // 4]
        ask_for(x, at, at + _STEP)
        for i in range(_STEP):
            value = number(step[i])
            code[i] = np.uint8(value > cut) - np.uint8(value < below) + np.uint8(1)
        for i in range(_STEP // 4):
            word = words[i]
            word = word | word >> np.uint32(6) | word >> np.uint32(12) | word >> np.uint32(18)
            packed[i] = np.uint8(word & np.uint32(255))
    for i in range(half * _STEP // 2, out.shape[0]):
        byte = 0
        for j in range(4):
            trit = 0
            if 4 * i + j < x.shape[0]:
                value = number(x[4 * i + j])
                trit = int(value > cut) - int(value < below)
            byte |= (1 + trit) << (2 * j)
        out[i] = byte
