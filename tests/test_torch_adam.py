"""bitring's own Adam, of NumPy arrays, against PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_models import batches, cross_entropy, dense, distance, mean_gradients, values  # noqa: E402

import bitring  # noqa: E402


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("adam:lr=1e-3", lambda ps: torch.optim.Adam(ps, lr=1e-3)),
        ("adam:lr=3e-3,beta1=0.8,weight_decay=0.01", lambda ps: torch.optim.Adam(ps, 3e-3, (0.8, 0.999), 1e-8, 0.01)),
        ("adam:weight_decay=0.1,decoupled=true", lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1)),
    ],
    ids=["adam", "l2", "adamw"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adam_is_that_of_pytorch_as_in_one_process(comm, agree, mine, theirs, dtype):
    """50 steps of DataParallel over the module's memory, weighted; 1e-6 relative, replicas equal to the bit."""
    model, reference = dense().to(dtype), dense().to(dtype)
    named = dict(model.named_parameters())
    trainer = bitring.DataParallel({name: p.detach() for name, p in named.items()}, mine, comm=comm)
    inner = theirs(reference.parameters())
    data = [[(x.to(dtype), y) for x, y in batches(50, seed=r)] for r in range(comm.size)]
    weights = [float(r % 3 + 1) for r in range(comm.size)]
    for step in range(50):
        model.zero_grad()
        cross_entropy(model, *data[comm.rank][step]).backward()
        trainer.step({name: p.grad for name, p in named.items()}, weight=weights[comm.rank])
        mean_gradients(
            reference, comm.size, weights, lambda r, step=step: cross_entropy(reference, *data[r][step]).backward()
        )
        inner.step()
    apart = distance(values(model), values(reference))
    agree(comm, apart <= 1e-6, f"{apart:.2e}")
    agree(comm, len(set(comm.allgather(values(model).numpy().tobytes()))) == 1, "replicas differ")
    agree(comm, not np.isnan(apart))
    trainer.free()
