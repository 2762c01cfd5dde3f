"""Every kernel of one backend once on CUDA, on shapes small enough for compute-sanitizer: ``sanitize.py BACKEND``.

Exit code 3 where the backend does not run here. Results are compared too, so that a kernel that wrote nothing is seen.
"""

import sys

import torch

import tersor

# (B, H, W, heads, head_dim), kernel size, dilations: odd sizes, a window larger than the image, one position.
CASES = [((1, 9, 7, 3, 24), 3, (1, 2, 3)), ((2, 3, 2, 2, 5), 5, (1, 2)), ((1, 1, 1, 1, 1), 3, (1,))]
NOT_HERE = 3


def run(backend: str, shape: tuple[int, ...], kernel_size: int, dilation: tuple[int, ...], dtype: torch.dtype) -> float:
    """Largest difference of output and gradient from the reference in the same dtype."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width, *rest = shape
    qkv = torch.randn(batch, height, width, 3, *rest, generator=generator).to("cuda", dtype)
    grad_output = torch.randn(shape, generator=generator).to("cuda", dtype)
    found = []
    for name in (backend, "reference"):
        with tersor.use_backend(name):
            leaf = qkv.clone().requires_grad_()
            output = tersor.dilated_attention(*leaf.unbind(3), kernel_size, dilation)
            found.append([output, *torch.autograd.grad(output, leaf, grad_output)])
    torch.cuda.synchronize()
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(*found, strict=True))


def main() -> int:
    backend = sys.argv[1]
    try:
        with tersor.use_backend(backend):
            rows = [row for row in tersor.backends() if row.device == "cuda"]
    except RuntimeError as error:
        print(error)
        return NOT_HERE
    if idle := [row for row in rows if row.runs != backend]:
        print("; ".join(f"{row.operator} runs on {row.runs}: {row.refused.get(backend, 'refused')}" for row in idle))
    if len(idle) == len(rows):
        return NOT_HERE
    worst = 0.0
    for case in CASES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            off = run(backend, *case, dtype)
            print(f"{backend} {case} {dtype}: {off:.1e}")
            allowed = 1e-4 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps  # gradients here reach 10
            worst = max(worst, off / allowed)
    return int(not worst <= 1)


if __name__ == "__main__":
    sys.exit(main())
