"""The best product of two narrow matrices for a weight, and what each rank costs: error of the output on the samples, and operations.

A weight W [in, out] is cut to W V V^T, V [out, r] orthonormal. With V of the largest singular values of S^T W, where S S^T is the second moment
of the inputs, that is the optimum of the output error over all matrices of rank r (Wang et al. 2024, "SVD-LLM: Truncation-aware Singular
Value Decomposition for Large Language Model Compression"), and needs no inverse of S. S = diag(rms(x)^0.5) is ASVD (Yuan et al. 2023,
"ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models", there with mean |x|); S = 1 is the plain SVD.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt.core.contract import Array

METHODS = ("svd", "asvd", "whitened")
_ALPHA = 0.5  # of ASVD
_DAMPING = 1e-3  # of the mean of the diagonal: what the samples never show still counts a little
_TINY = float(np.finfo(np.float32).tiny)
_NOTHING = 1e-12  # of the largest eigenvalue: rounding


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """How a weight can be cut.

    Attributes:
        basis: V [.., out, k], orthonormal columns; the first r are those of rank r.
        energy: [k] what each column carries of the mean square of the output on the samples (or of the weight, without samples).
        total: their sum, and what no column carries.
    """

    basis: Array
    energy: Array
    total: float

    def error(self, rank: int) -> float:
        """||y - cut y||^2 / ||y||^2 at this rank."""
        return max(float(1 - self.energy[:rank].sum() / self.total), 0.0) if self.total > 0 else 0.0

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this part of the energy; rounding noise is not kept."""
        kept = np.cumsum(self.energy)
        return min(int(np.searchsorted(kept, energy * self.total * (1 - _NOTHING))) + 1, len(kept))


def spectrum(weight: Array, moments: Array | None, method: str) -> Spectrum:
    """The Spectrum of W [.., in, out] for inputs with these second moments [in, in] (None: white inputs); matrices of a batch share their ranks."""
    w = np.asarray(weight, np.float64)
    seen = None if moments is None else np.asarray(moments, np.float64)
    basis = _basis(_scaled(w, seen, method))
    product = w @ basis
    energy = np.square(product) if seen is None else product * (seen @ product)
    whole = np.square(w).sum() if seen is None else (w * (seen @ w)).sum()
    told = np.maximum(energy.sum(axis=-2), 0)
    return Spectrum(basis, told.reshape(-1, told.shape[-1]).sum(0), float(whole))


def factors(weight: Array, cut: Spectrum, rank: int) -> tuple[Array, Array]:
    """[.., in, r] and [.., r, out], float64.

    The columns of the basis differ much in size, and one 8-bit grid for all of them would be as coarse as the largest asks for. So both factors
    take the square root of it, and the space between them is turned by a fixed rotation, after which all are alike (Ashkboos et al. 2024, "QuaRot").
    """
    basis = cut.basis[..., :rank]
    left, right = np.asarray(weight, np.float64) @ basis, np.swapaxes(basis, -1, -2)
    norms = np.sqrt(np.linalg.norm(left, axis=-2))
    norms[norms == 0] = 1
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((rank, rank)))[0]
    return left / norms[..., None, :] @ turn, turn.T @ (right * norms[..., :, None])


def _scaled(w: Array, moments: Array | None, method: str) -> Array:
    """S^T W."""
    if moments is None or method == "svd":
        return w
    if method == "asvd":
        scale = np.maximum(np.diag(moments), _TINY) ** (_ALPHA / 2)
        return np.asarray(scale[:, None] * w)
    damped = moments + _DAMPING * np.maximum(np.diag(moments).mean(), _TINY) * np.eye(len(moments))
    return np.asarray(np.linalg.cholesky(damped).T @ w)


def _basis(a: Array) -> Array:
    """The right singular vectors [.., out, min(in, out)] of A [.., in, out], the largest value first."""
    rows, columns = a.shape[-2:]
    across = np.swapaxes(a, -1, -2)
    if columns <= rows:  # from the eigenvectors of the smaller square: what rounding spoils there carries 1e-8 of the output at most
        return np.ascontiguousarray(np.linalg.eigh(across @ a)[1][..., ::-1])
    values, vectors = np.linalg.eigh(a @ across)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    turned = across @ vectors
    lengths = np.linalg.norm(turned, axis=-2, keepdims=True)
    safe = lengths > np.sqrt(_NOTHING) * np.max(lengths, axis=-1, keepdims=True, initial=_TINY)
    return np.asarray(np.where(safe, turned / np.where(safe, lengths, 1), 0))
