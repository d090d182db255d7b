"""The engine's random numbers (spec: Philox4x32-10, Box and Muller), for scripts that need the same noise."""

import numpy as np

LATENTS, SAMPLER, INIT, ERASURE, MERGE, SILENCE = 1, 2, 3, 7, 10, 12


def start_seed(seed, name):
    """The seed of what the concept `name` starts from: Concept::start_seed of the SDK (64-bit FNV-1a)."""
    digest = 0xCBF29CE484222325
    for byte in name.encode():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return seed ^ digest


def bits(seed, stream, step, lane, n):
    """The first n (rounded up to a multiple of 4) 32-bit words of Rng::new(seed, stream, step, lane)."""
    blocks = np.arange((n + 3) // 4, dtype=np.uint64)
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [blocks & mask, blocks >> shift, np.full_like(blocks, step), np.full_like(blocks, stream << 16 | lane)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [p1 >> shift ^ c[1] ^ np.uint64(k[0]), p1 & mask, p0 >> shift ^ c[3] ^ np.uint64(k[1]), p0 & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1).reshape(-1)


def uniforms(seed, stream, step, lane, n):
    """Its first n numbers in [0, 1), in f32."""
    return (bits(seed, stream, step, lane, n)[:n] >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def normals(seed, stream, step, lane, n):
    """Its first n standard normals, in f32."""
    u = bits(seed, stream, step, lane, n).reshape(-1, 2).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((u[:, 0] + 1.0) / 2.0**32))
    angle = 2.0 * np.pi * u[:, 1] / 2.0**32
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n].astype(np.float32)
