from collections.abc import Sequence
import enum
from typing import Annotated, Any, Final

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

class Collective(enum.Enum):
    allreduce = 0

    reduce = 1

    broadcast = 2

    allgather = 3

    reduce_scatter = 4

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

def set_neighbours(value: bool) -> None: ...

def news_comes_to(descriptor: int) -> None: ...

def end_before_library() -> bool: ...

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

    @property
    def stranger(self) -> int: ...

    @property
    def strange(self) -> int: ...

    @property
    def earlier(self) -> list[int]: ...

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

    def unite(self, rank: int) -> None: ...

    def part_again(self) -> None: ...

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

    def repeats(self, signature: int) -> bool: ...

    @property
    def repeating(self) -> bool: ...

class NodeRollCall(RollCall):
    def __init__(self, node: Node) -> None: ...

class NodesRollCall(RollCall):
    def __init__(self, node: Node | None, library: MpiLibrary, handle_size: int, comm: int, byte: int, rank: int, nodes: Sequence[Sequence[int]], tag: int) -> None: ...

    @property
    def most(self) -> int: ...

    def place(self) -> tuple[int, list[int], bool]: ...

class Agreement(Operation):
    def __init__(self, roll_call: RollCall, signature: int, library: bool, bad: bool, told: bool) -> None: ...

    @property
    def verdict(self) -> Verdict: ...

class Checked(Operation):
    def __init__(self, roll_call: RollCall, signature: int, next: Operation) -> None: ...

    def sign(self, signature: int) -> None: ...

    @property
    def verdict(self) -> Verdict: ...

class DirectCollective(Operation):
    @property
    def verdict(self) -> Verdict: ...

class NodeCollective(DirectCollective):
    def __init__(self, node: Node) -> None: ...

    most: Final[int] = ...
    """(arg: object, /) -> int"""

class LeadersCollective(DirectCollective):
    def __init__(self, roll_call: NodesRollCall, signature: int, collective: Collective, source: int, target: int, n: int, itemsize: int, kernel: int, root: int, stride: int) -> None: ...

    def sign(self, signature: int) -> None: ...

class SharedAllreduce(DirectCollective):
    def __init__(self, node: Node, signature: int, operands: Sequence[tuple[int, int, int, int]], region: Region | None) -> None: ...

    def sign(self, signature: int) -> None: ...

    @staticmethod
    def small(size: int) -> int: ...

class Program:
    def __init__(self, messages: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], unblocks_starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], unblocks: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], streams_starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], streams: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], slots: int, slot_values: int, window: int) -> None: ...

    message_fields: Final[list[str]] = ...
    """(arg: object, /) -> list[str]"""

class MpiLibrary:
    def __init__(self, path: str) -> None: ...

class LibraryCollective(Operation):
    @staticmethod
    def make(library: MpiLibrary, handle_size: int, collective: Collective, comm: int, datatype: int, op: int, in_place: int, count: int, root: int) -> LibraryCollective: ...

    @staticmethod
    def persistent(library: MpiLibrary, handle_size: int, request: int) -> LibraryCollective: ...

    def bind(self, source: int, target: int) -> None: ...

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

class WatchedRun(Operation):
    def __init__(self, check: DirectCollective, words: int) -> None: ...

    def follow(self, operation: Operation | None) -> None: ...

    def look_at(self, values: int, n: int, type: Type, bad: int) -> None: ...

    def prepare(self, bad: int, state: int, wait: int, goes_on: bool) -> None: ...

    @property
    def followed(self) -> bool: ...

    @property
    def waited(self) -> int: ...

    @property
    def verdict(self) -> Verdict: ...

class FastPath:
    def __init__(self, allreduce: DirectCollective, others: DirectCollective, rank: int, size: int, ndarray: object, in_place: object) -> None: ...

    def serve(self, op: object, operation: Op, type: Type, signature: int) -> None: ...

    def limit(self, least: int, most: int) -> None: ...

    def add(self, region: Region) -> None: ...

    def remove(self, number: int) -> None: ...

    def allreduce(self, sendbuf: object | None, recvbuf: object | None, op: object | None) -> int: ...

    def remember(self, op: object, type: Type, shape: Sequence[int], signature: int) -> None: ...

    def reduce(self, x: object | None, out: object | None, op: object | None) -> int: ...

    def know(self, collective: Collective, op: object | None, type: Type, n: int, root: int, signature: int, library: LibraryCollective | None, checked: Operation | None) -> None: ...

    def call(self, collective: Collective, sendbuf: object | None, recvbuf: object | None, op: object | None, root: object) -> int: ...

    def runs(self, operation: Operation, seconds: float) -> Runs: ...

    @property
    def inside(self) -> int: ...

    @property
    def doing(self) -> str: ...

    def refuse(self) -> int: ...

    def taken_over(self) -> None: ...

    def close(self) -> None: ...

    @property
    def operation(self) -> Operation: ...

    def keep_to(self, busy: bool, thread: int) -> None: ...

class Runs:
    def run(self) -> int: ...

class Rule(enum.Enum):
    sgd = 0

    sgd_momentum = 1

    sgd_nesterov = 2

    adagrad = 3

class Updater:
    def __init__(self, rule: Rule, type: Type, lr: float, momentum: float, weight_decay: float, eps: float) -> None: ...

class Shard:
    def __init__(self, rank: int, size: int, values: int, slot: int, n: int, itemsize: int, locks: int, keep: object) -> None: ...

    @staticmethod
    def locks_nbytes(nbytes: int) -> int: ...

    def bury(self, rank: int) -> None: ...

class ShardPass:
    @staticmethod
    def update(shard: Shard, starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int, values: int, locked: bool, updater: Updater) -> ShardPass: ...

    @staticmethod
    def read(shard: Shard, starts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], width: int, values: int, locked: bool) -> ShardPass: ...

    def run(self, seconds: float) -> int: ...

class SharedWords:
    def __init__(self, rank: int, size: int, memory: int, keep: object) -> None: ...

    @staticmethod
    def nbytes(words: int) -> int: ...

    def acquire(self, seconds: float) -> int: ...

    def release(self) -> None: ...

    def bury(self, rank: int) -> None: ...

    @property
    def words(self) -> int: ...

    @property
    def bell(self) -> int: ...

    def ring(self) -> None: ...

    def wait(self, seen: int, seconds: float) -> bool: ...

class StoreKind(enum.Enum):
    push = 0

    clock = 1

    leave = 2

    rest = 3

    end = 4

    read = 5

    use = 6

    slots = 7

    claim = 8

    go_on = 9

    ahead = 10

    forget = 11

    values = 20

    deferred = 21

    taken = 22

    dropped = 23

    settled = 24

    are = 25

    claimed = 26

    trouble = 30

class StoreRule:
    def __init__(self, staleness: int | None, inverse: bool, clocks: Sequence[int]) -> None: ...

    def push(self, member: int, number: int, weight: float, round: int | None) -> list[tuple[Any, ...]]: ...

    def read(self, member: int, ticket: int, least: int | None) -> list[tuple[Any, ...]]: ...

    def claim(self, member: int, ticket: int, row: Sequence[int]) -> list[tuple[Any, ...]]: ...

    def clock(self, member: int) -> list[tuple[Any, ...]]: ...

    def leave(self, member: int) -> list[tuple[Any, ...]]: ...

    def rest(self, member: int) -> list[tuple[Any, ...]]: ...

    def end(self, member: int) -> list[tuple[Any, ...]]: ...

    def go_on(self, member: int) -> None: ...

    @property
    def version(self) -> int: ...

    @property
    def settled(self) -> int: ...

    @property
    def common_clocks(self) -> list[float]: ...

    @property
    def ended(self) -> list[int]: ...

    @property
    def resting(self) -> list[int]: ...

    @property
    def missing(self) -> list[int]: ...

    @property
    def waiting(self) -> int: ...

class StoreOwner:
    def __init__(self, state: StoreRule, members: int, parts: Sequence[tuple[int, int, int, int, int, Type]], rule: Rule, lr: float, momentum: float, weight_decay: float, eps: float, keep: object) -> None: ...

    window: Final[int] = ...
    """(arg: object, /) -> int"""

    def use(self, member: int, rule: Rule, lr: float, momentum: float, weight_decay: float, eps: float) -> None: ...

    def seen(self) -> tuple[list[float], int, int, list[tuple[int, int]]]: ...

class StoreService(Operation):
    def __init__(self, library: MpiLibrary, handle_size: int, comm: int, byte: int, rank: int, size: int, owner: StoreOwner | None) -> None: ...

    def post(self, rank: int, kind: int, serial: int, numbers: Sequence[float], payload: object | None) -> None: ...

    def take(self) -> list[tuple[Any, ...]]: ...

    most_payload: Final[int] = ...
    """(arg: object, /) -> int"""

    def resume(self) -> None: ...

    def wait(self, seconds: float) -> None: ...

    def mind_room(self, minds: bool) -> None: ...

    @property
    def ended(self) -> bool: ...

    @property
    def nbytes_sent(self) -> int: ...

    @property
    def moves(self) -> int: ...

class HopExchange(Operation):
    def __init__(self, library: MpiLibrary, handle_size: int, comm: int, byte: int, rank: int, type: Type, hops: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], moves: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], codec: Codec | None, wide_itemsize: int) -> None: ...

    def keep(self, results: object) -> None: ...

    def send(self, hop: int, array: int) -> None: ...

    def expect(self, hop: int, array: int) -> None: ...

    def expect_sent(self) -> None: ...

    hop_fields: Final[list[str]] = ...
    """(arg: object, /) -> list[str]"""

    move_fields: Final[list[str]] = ...
    """(arg: object, /) -> list[str]"""
