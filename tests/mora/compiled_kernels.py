"""Compile the Triton kernels for an H100, on a machine without a GPU, and check what they would be launched with.

Not in Triton's interpreter, and so a process of its own: python compiled_kernels.py. It prints a line for each kernel.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mora import Layout, triton_kernels
from mora.dropout import Mask


class H100:
    """What Triton asks a driver for before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


KINDS = {"i32": int, "i64": int, "fp32": float, "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}


class Launched:
    """In place of a compiled kernel: its launch checks the arguments against what it was compiled for."""

    def __init__(self, compiled: Any):
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any) -> None:
            assert len(grid) == 3 and all(0 < n < 2**31 for n in grid)
            signature = self.compiled.src.signature
            assert len(arguments) == len(signature)
            for given, (name, kind) in zip(arguments, signature.items(), strict=True):
                if kind != "constexpr":
                    found = given.dtype if isinstance(given, torch.Tensor) else type(given)
                    assert found is KINDS[kind], (name, kind, given)
            assert self.compiled.asm["cubin"]
            print(self.compiled.name, list(signature.values())[:2], grid)

        return launch


def main() -> None:
    driver.set_active(H100())
    compiled = triton_kernels._compiled
    triton_kernels._compiled = lambda *arguments: Launched(compiled(*arguments))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout in (Layout(64, 64, 16), Layout(40, 72, 10, "blocked", "blocked")):
            x, y = (torch.zeros(5, n, dtype=dtype) for n in (layout.in_features, layout.out_features))
            for groups in (triton_kernels._inputs(layout), triton_kernels._input_blocks(layout)):
                for mask in (None, Mask(3, 0.1), Mask(2**62 + 1, 0.1)):
                    sums = triton_kernels.sum_groups(x, groups, mask)
                    triton_kernels.add_to_groups(x, sums, groups, mask)
            outs = triton_kernels._outputs(layout)
            triton_kernels.add_to_groups(y, triton_kernels.sum_groups(y, outs), outs)
            m_NRR = triton_kernels.rotation_matrices(torch.zeros(layout.size, layout.size, dtype=dtype), layout)
            triton_kernels.rotation_matrices_adjoint(m_NRR, layout)


if __name__ == "__main__":
    main()
