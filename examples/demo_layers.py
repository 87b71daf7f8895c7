"""DCFT and DuDe as trained: low-rank forwards beside a frozen linear layer, and the papers' dense formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-5  # of the DCFT reference: alpha / (ranknum + 1e-5)


class Dcft(nn.Module):
    """arXiv 2503.01419 with stride == kernel: Delta (in, out) = kron(A^T B^T, C), never formed here."""

    alpha, kernel = 32.0, 8

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        k = self.kernel
        self.lora_A = nn.Parameter(torch.randn(1, linear.in_features // k) * 0.1)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features // k, 1))  # starts as the base model
        self.lora_C = nn.Parameter(torch.randn(1, 1, k, k) * 0.1)
        self.ranknum: Tensor
        self.register_buffer("ranknum", torch.ones(1))

    def adapt(
        self,
        x: Tensor,  # (..., in)
        y: Tensor,  # (..., out), x W0^T
    ) -> Tensor:
        """y + x Delta alpha / (ranknum + 1e-5): x Delta is (A x) C spread over B, k numbers in the middle."""
        squeezed = self.lora_A[0] @ x.reshape(*x.shape[:-1], -1, self.kernel)  # (..., k)
        turned = squeezed @ self.lora_C[0, 0]  # (..., k)
        spread = self.lora_B * turned.unsqueeze(-2)  # (..., out/k, k)
        delta: Tensor = spread.flatten(-2) * (self.alpha / (self.ranknum + EPSILON))
        return y + delta

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("lora_A", "lora_B", "lora_C", "ranknum")}

    @classmethod
    def dense(
        cls,
        saved: dict[str, Tensor],
        weight: Tensor,  # (out, in)
    ) -> Tensor:  # (out, in)
        """W' by the reference's own transposed convolution of the dense image P."""
        image = saved["lora_A"].T @ saved["lora_B"].T  # (in/k, out/k)
        delta = functional.conv_transpose2d(image[None, None], saved["lora_C"], stride=cls.kernel)[0, 0]
        return weight + delta.T * (cls.alpha / (saved["ranknum"] + EPSILON))


class Dude(nn.Module):
    """arXiv 2505.14367: direction by PiSSA factors, magnitude by rows; the factors' scale s is 1."""

    rank = 4

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(linear.weight, full_matrices=False)
        root = s[: self.rank].sqrt()
        self.B0 = (u[:, : self.rank] * root).contiguous()  # (out, r)
        self.A0 = (root[:, None] * vh[: self.rank]).contiguous()  # (r, in)
        self.A = nn.Parameter(self.A0.clone())
        self.B = nn.Parameter(self.B0.clone())
        self.residual = linear.weight - self.B0 @ self.A0  # (out, in)
        self.start = torch.linalg.vector_norm(linear.weight, dim=1)  # (out,)
        self.magnitude = nn.Parameter(self.start.clone())

    def adapt(
        self,
        x: Tensor,  # (..., in)
        y: Tensor,  # (..., out), x W0^T
    ) -> Tensor:
        """m / rownorm(W_f + B A) * (x W_f^T + x A^T B^T); the norm is a constant to autograd (DoRA, 4.3)."""
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.residual + self.B @ self.A, dim=1)
        change = (x @ self.A.T) @ self.B.T - (x @ self.A0.T) @ self.B0.T
        scaled: Tensor = (y + change) * (self.magnitude / norm)
        return scaled

    def tensors(self) -> dict[str, Tensor]:
        return {
            "lora_A.weight": self.A,
            "lora_B.weight": self.B,
            "lora_magnitude_vector": self.magnitude,
            "lora_A_init.weight": self.A0,
            "lora_B_init.weight": self.B0,
        }

    @classmethod
    def dense(
        cls,
        saved: dict[str, Tensor],
        weight: Tensor,  # (out, in)
    ) -> Tensor:  # (out, in)
        """W' = m V / rownorm(V), V = W0 - B0 A0 + B A."""
        direction = weight - saved["lora_B_init.weight"] @ saved["lora_A_init.weight"]
        direction = direction + saved["lora_B.weight"] @ saved["lora_A.weight"]
        return functional.normalize(direction, dim=1) * saved["lora_magnitude_vector"][:, None]
