"""The tensor-core instruction of Hopper as C++ functions: 32 inputs of 64 outputs by ``tokens`` tokens."""

from __future__ import annotations


def wgmma_header(tokens: int, weight_type: str) -> str:
    """A function ``wgmma_<weight_type>``: int32 sums in registers, weights in registers, int8 tokens in shared memory.

    The instruction names each of its ``tokens / 2`` registers of sums, which only a generator can write for any width.

    Args:
        tokens: a multiple of 8 up to 256 that the instruction has (8, 16, 24, 32, then multiples of 16).
        weight_type: "s8" or "u8".
    """
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    weights = ", ".join(f"%{count + i}" for i in range(4))
    return f"""__device__ __forceinline__ void wgmma_{weight_type}(
    int (&d)[{count}], const u32* a, u64 tile, int accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.{weight_type}.s8 {{{sums}}}, {{{weights}}}, "
                 "%{count + 4}, p;\\n}}\\n"
                 : {outputs}
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(accumulate));
}}
"""
