from collections.abc import Sequence
import enum
from typing import Annotated, Final

import numpy
from numpy.typing import NDArray


class Op(enum.Enum):
    add = 0

    multiply = 1

    maximum = 2

    minimum = 3

    logical_and = 4

    logical_or = 5

    logical_xor = 6

    bitwise_and = 7

    bitwise_or = 8

    bitwise_xor = 9

class Type(enum.Enum):
    bool = 0

    int8 = 1

    int16 = 2

    int32 = 3

    int64 = 4

    uint8 = 5

    uint16 = 6

    uint32 = 7

    uint64 = 8

    float16 = 9

    bfloat16 = 10

    float32 = 11

    float64 = 12

    longdouble = 13

    complex64 = 14

    complex128 = 15

    clongdouble = 16

class Outcome(enum.Enum):
    done = 0

    declined = 1

    disagree = 2

    unfinished = 3

    refused = 4

def instruction_set() -> str: ...

def kernel(op: Op, type: Type) -> int: ...

def reduce(kernel: int, n: int, inputs: Sequence[int], outputs: Sequence[int]) -> None: ...

def with_count(signature: int, count: int) -> int: ...

def limit_threads(threads: int) -> None: ...

def set_crowded(value: bool) -> None: ...

def news_comes_to(descriptor: int) -> None: ...

def unread_news() -> bool: ...

class Memory:
    @staticmethod
    def make(nbytes: int, name: str) -> Memory: ...

    @staticmethod
    def open(nbytes: int, pid: int, descriptor: int, name: str) -> Memory: ...

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def descriptor(self) -> int: ...

    def close_descriptor(self) -> None: ...

    def unlink(self) -> None: ...

    def read(self, n: int) -> bytes: ...

    def write(self, text: bytes) -> None: ...

class Presence:
    @staticmethod
    def make(name: str) -> Presence: ...

    @staticmethod
    def open(pid: int, descriptor: int, name: str) -> Presence: ...

    @property
    def left(self) -> bool: ...

    @property
    def dead(self) -> bool: ...

    def leave(self) -> None: ...

    @property
    def memory(self) -> Memory: ...

class Wake:
    def __init__(self) -> None: ...

    def set(self) -> None: ...

    def clear(self) -> None: ...

class Verdict:
    @property
    def same(self) -> bool: ...

    @property
    def same_function(self) -> bool: ...

    @property
    def library(self) -> bool: ...

    @property
    def bad(self) -> bool: ...

    @property
    def told(self) -> bool: ...

class Operation:
    def begin(self) -> None: ...

    def advance(self) -> None: ...

    @property
    def over(self) -> bool: ...

    @property
    def disagrees(self) -> bool: ...

    @property
    def moves(self) -> int: ...

    @property
    def calls_library(self) -> bool: ...

    @property
    def awaited(self) -> int: ...

    @property
    def error(self) -> int: ...

    @property
    def reason(self) -> str: ...

def drive(operations: Sequence[Operation], wake: Wake, seconds: float, gentle: bool) -> int: ...

class Region:
    def __init__(self, rank: int, number: int, parts: Sequence[Memory]) -> None: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def number(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def address(self, rank: int) -> int: ...

    def holds(self, data: int, nbytes: int) -> bool: ...

    def where(self, data: int) -> int: ...

class Node:
    def __init__(self, region: Region, names: Sequence[int]) -> None: ...

    @staticmethod
    def nbytes(size: int) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

class RollCall:
    @property
    def calls_library(self) -> bool: ...

class NodeRollCall(RollCall):
    def __init__(self, node: Node) -> None: ...

class NodesRollCall(RollCall):
    def __init__(self, node: Node | None, library: MpiLibrary, handle_size: int, comm: int, byte: int, rank: int, leaders: Sequence[int], tag: int) -> None: ...

    @property
    def most(self) -> int: ...

class Agreement(Operation):
    def __init__(self, roll_call: RollCall, signature: int, library: bool, bad: bool, told: bool) -> None: ...

    @property
    def verdict(self) -> Verdict: ...

class Checked(Operation):
    def __init__(self, roll_call: RollCall, signature: int, next: Operation) -> None: ...

    @property
    def verdict(self) -> Verdict: ...

class DirectAllreduce(Operation):
    @property
    def verdict(self) -> Verdict: ...

class LeadersAllreduce(DirectAllreduce):
    def __init__(self, roll_call: NodesRollCall, signature: int, data: int, n: int, itemsize: int, kernel: int, own_first: int, own_last: int) -> None: ...

    def sign(self, signature: int) -> None: ...

class SharedAllreduce(DirectAllreduce):
    def __init__(self, node: Node, signature: int, operands: Sequence[tuple[int, int, int, int]], region: Region | None) -> None: ...

    @staticmethod
    def small(size: int) -> int: ...

class Program:
    def __init__(self, messages: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], unblocks_starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], unblocks: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], streams_starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], streams: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], slots: int, slot_values: int, window: int) -> None: ...

    message_fields: Final[list[str]] = ...
    """(arg: object, /) -> list[str]"""

class MpiLibrary:
    def __init__(self, path: str) -> None: ...

class LibraryAllreduce(Operation):
    @staticmethod
    def make(library: MpiLibrary, handle_size: int, comm: int, datatype: int, op: int, in_place: int, count: int) -> LibraryAllreduce: ...

    def bind(self, buffer: int) -> None: ...

class Execution(Operation):
    def __init__(self, program: Program, library: MpiLibrary, handle_size: int, comm: int, byte: int, rank: int, itemsize: int, kernel: int) -> None: ...

    def bind(self, buffer: int) -> None: ...

class LaneAllreduce(Operation):
    def __init__(self, node: Node, signature: int, buffer: int, n: int, itemsize: int, kernel: int, region: Region, lanes: int, between: Operation | None) -> None: ...

    @property
    def verdict(self) -> Verdict: ...

    @property
    def lane_values(self) -> int: ...

    @staticmethod
    def chunk_start(n: int, lanes: int, lane: int) -> int: ...

class Norms:
    @property
    def values(self) -> float: ...

    @property
    def sums(self) -> float: ...

    @property
    def residual(self) -> float: ...

class RunStats:
    @property
    def nanoseconds(self) -> int: ...

    @property
    def encode(self) -> int: ...

    @property
    def decode(self) -> int: ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def norms(self) -> Norms: ...

    @property
    def owner_norms(self) -> Norms: ...

    @property
    def finite(self) -> bool: ...

class Codec:
    def __init__(self, encode: int, decode: int, encode_sum: int, decode_sum: int, settings: int) -> None: ...

class OwnerExchange(Operation):
    def __init__(self, library: MpiLibrary, handle_size: int, comm: int, byte: int, rank: int, size: int, type: Type, codecs: Sequence[Codec], fixed_size: bool, owners: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], segments: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], stops: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], nbytes: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], encoded_by: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], residual: int, owner_residual: int, owned_from: int, to_owner_tag: int, from_owner_tag: int) -> None: ...

    def bind(self, buffer: int) -> None: ...

    def prepare(self, run: int, seed: int) -> None: ...

    def keep(self, residual: int, owner_residual: int) -> None: ...

    def forget(self) -> None: ...

    def bring_back(self) -> None: ...

    @property
    def stats(self) -> RunStats: ...

class FastPath:
    def __init__(self, operation: DirectAllreduce, ndarray: object, in_place: object) -> None: ...

    def serve(self, op: object, operation: Op, type: Type, signature: int) -> None: ...

    def limit(self, least: int, most: int) -> None: ...

    def add(self, region: Region) -> None: ...

    def remove(self, number: int) -> None: ...

    def allreduce(self, sendbuf: object | None, recvbuf: object | None, op: object | None) -> int: ...

    def remember(self, op: object, type: Type, shape: Sequence[int], signature: int) -> None: ...

    def reduce(self, x: object | None, out: object | None, op: object | None) -> int: ...

    def runs(self, operation: Operation, seconds: float) -> Runs: ...

    @property
    def inside(self) -> int: ...

    @property
    def in_allreduce(self) -> bool: ...

    def refuse(self) -> int: ...

    def taken_over(self) -> None: ...

    def close(self) -> None: ...

    @property
    def operation(self) -> DirectAllreduce: ...

    def keep_to(self, busy: bool, thread: int) -> None: ...

class Runs:
    def run(self) -> int: ...
