"""Bucket sizes are those of the buckets that DataParallel makes."""

import numpy as np
import pytest

import bitring
from bitring.training.step.bucket_sizes import Size, bucket_sizes, kind_of

VALUES = {"a": 3000, "b": 10, "c": 5000, "none": 0, "d": 200, "e": 4000, "f": 4}


@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("bucket_bytes", [1, 16_000, 36_000, 1 << 20])
def test_they_are_data_parallel_s(comm, agree, compression: str | None, bucket_bytes: int):
    parameters = {name: np.zeros(count, np.float32) for name, count in VALUES.items()}
    trainer = bitring.DataParallel(
        parameters, bitring.SGD(lr=0.1), comm=comm, compression=compression, bucket_bytes=bucket_bytes
    )
    made = [(tuple(bucket.views), bucket.compressor) for bucket in trainer.buckets]
    trainer.free()
    compressor = bitring.OneBit() if compression else None
    sizes = {name: Size("", count, 4 * count) for name, count in VALUES.items()}
    kinds = {name: kind_of(compressor, count) for name, count in VALUES.items()}
    agree(comm, made == [tuple(each) for each in bucket_sizes(sizes, kinds, bucket_bytes)])
