"""bitring for JAX: reductions inside ``jit``, and gradient averaging for optax. Needs the extra ``jax``.

``import bitring`` does not load it; see docs/jax.md.
"""

from bitring.jax.allreduce import allreduce as allreduce
from bitring.jax.average import Average as Average
from bitring.jax.average import average as average
from bitring.jax.broadcast import broadcast as broadcast
