from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class Clustering:
    @property
    def exemplars(self) -> NDArray[np.int64]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def n_iter(self) -> int: ...
    @property
    def converged(self) -> bool: ...
    @property
    def net_similarity(self) -> float: ...
    @property
    def n_unassigned(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...

def affinity_propagation(
    x: NDArray[np.float32],
    preference: float | NDArray[Any],
    *,
    damping: float = 0.5,
    max_iter: int = 200,
    convergence_iter: int = 15,
    n_threads: int = 0,
    precomputed: bool = False,
    memory_limit: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Clustering: ...
class Points:
    def __init__(self, x: NDArray[np.float32], *, memory_limit: int = 0) -> None: ...
    def affinity_propagation(
        self,
        preference: float | NDArray[Any],
        *,
        damping: float = 0.5,
        max_iter: int = 200,
        convergence_iter: int = 15,
        n_threads: int = 0,
        memory_limit: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> Clustering: ...

def affinity_propagation_sparse(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int64],
    similarity: NDArray[np.float32],
    preference: float | NDArray[Any],
    *,
    damping: float = 0.5,
    max_iter: int = 200,
    convergence_iter: int = 15,
    n_threads: int = 0,
    memory_limit: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Clustering: ...
def affinity_propagation_bytes(n: int, d: int) -> int: ...

class Items:
    def __init__(self, items: NDArray[np.float32], *, kernel: str = "auto") -> None: ...
    @property
    def shape(self) -> tuple[int, int]: ...

def top_n(
    interests: NDArray[np.float32],
    items: NDArray[np.float32] | Items,
    n: int,
    *,
    exclude_indptr: NDArray[np.int64] | None = None,
    exclude_indices: NDArray[np.int64] | None = None,
    allowed: NDArray[np.bool_] | None = None,
    n_threads: int = 0,
    kernel: str = "auto",
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]: ...
def diversify(
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
    category: NDArray[np.int32],
    n: int,
    *,
    penalty: float,
    n_threads: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
def softmax_loss(
    queries: NDArray[np.float32],
    items: NDArray[np.float32],
    target: NDArray[np.int64],
    weight: NDArray[np.float32],
    excluded: NDArray[np.int64],
    *,
    item_gradient: bool = True,
    n_threads: int = 0,
    kernel: str = "auto",
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]: ...
def kernels() -> list[str]: ...
