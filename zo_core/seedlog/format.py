"""The bytes of a seed log: a header, then records with chained checksums.

    header   magic 8s | version u32 | length u32 | JSON, deflated | crc32
    step     step u32 | coefficient f32, n times | loss f32 | learning rate f64, once per column | crc32
             before the checksum: with normalised steps, the state of the normaliser f64; with scores, their
             mean f64, standard deviation f64, minimum f64 and maximum f64
    change   0xFFFFFFFF | length u32 | JSON | crc32

Everything is little-endian. Each checksum starts from the previous one, so a record that is missing,
repeated or taken from another log is detected. With one direction and one learning rate a step is 24 bytes, and
32 if it is normalised. Seeds are not stored: they derive from the run's seed, the step and the direction. The
coefficients of a skipped step are NaN. Settings that change during the run (`Settings`) are in change-records, and so
is the number of directions, which changes with the number of processes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ..brake import in_float32
from ..errors import StateError
from ..noise import NOISES
from ..records import Probe, Rollback, Scores
from ..step import can_be_applied
from .checked import check_change, check_header, unpacked

if TYPE_CHECKING:
    from ..engine import ZeroOrder

MAGIC = b"\x89ZOLOG\r\n"
#: Logs of normalised steps have version 2: a column more in each step. Those with scores, version 3: four more.
VERSION, NORMALISED, SCORED = 1, 2, 3
CHANGE = 0xFFFFFFFF
PREFIX = struct.Struct("<8sII")
CRC = struct.Struct("<I")
CHANGE_PREFIX = struct.Struct("<II")
#: How much to read in search of a good record after damage; with one direction, 50 MB of the log.
SEARCHED = 1 << 30


@dataclass(frozen=True)
class Settings:
    """The settings of an update besides its probes and learning rates; they may change during the run.

    Attributes:
        seed: seed of the run.
        group_of: index of the parameter group of each slot.
        eps: eps of each group in units of the step's eps.
        weight_decay: weight decay of each group.
        columns: index of each group's learning rate among those in a record.
    """

    seed: int
    group_of: tuple[int, ...]
    eps: tuple[float, ...]
    weight_decay: tuple[float, ...]
    columns: tuple[int, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        lists = [tuple(values[field.name]) for field in fields(cls)[1:]]
        return cls(values["seed"], *lists)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoggedStep:
    """One step of a log, with everything needed to repeat it.

    Attributes:
        step: index of the step.
        coefficients: one per direction, as they were applied; empty if the step was skipped.
        loss: the reported loss, in float32.
        lrs: learning rate of each parameter group.
        settings: the settings of the step.
        draws: whether measuring it drew from the global random generators (dropout does).
        rule: the rule of the step, as its registry describes it.
        noise: the noise of the run, as its registry describes it; it derives the seeds of a step.
        merged: whether closing the engine ended low-rank windows before the step.
        normaliser: state of the step normaliser after the step; None without one.
        rollback: what the brake reverted instead of an update in this step, which is then a skipped one; or None.
        scores: what the closures returned; None in a log without scores, and where one was not finite.
        failed: whether the step was skipped without a loss: a query failed, or `ZeroOrder.skip` was called.
    """

    step: int
    coefficients: tuple[float, ...]
    loss: float
    lrs: tuple[float, ...]
    settings: Settings = field(repr=False)
    draws: bool = False
    rule: Any = field(default=None, repr=False, hash=False)
    noise: Any = field(default="rademacher", repr=False, hash=False)
    merged: bool = False
    normaliser: float | None = None
    rollback: Rollback | None = None
    scores: Scores | None = None
    failed: bool = False

    @property
    def skipped(self) -> bool:
        return not self.coefficients

    @property
    def why(self) -> str | None:
        """Why the step moved nothing, as far as a log tells; None if it moved weights."""
        if self.rollback is not None:
            return f"went back to before step {self.rollback.to}"
        if self.failed:
            return "skipped without a loss"
        return "skipped" if self.skipped else None

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        """The directions with their coefficients, as in the `zo_core.StepRecord` of the step."""
        seed_of, base = NOISES.resolve(self.noise).seed, self.settings.seed
        return tuple(Probe(seed_of(base, self.step, i), c) for i, c in enumerate(self.coefficients))

    def repeat(self, engine: ZeroOrder) -> None:
        """Makes the next step of an engine this one, see `zo_core.ZeroOrder.repeat`."""
        engine.repeat(self.probes, self.loss, self.normaliser, self.rollback, self.scores, self.failed)


@lru_cache(maxsize=64)
def step_struct(num_probes: int, num_lrs: int) -> struct.Struct:
    """The layout of a step-record without its checksum; ``num_lrs`` counts all numbers after the loss."""
    return struct.Struct(f"<I{num_probes}ff{num_lrs}d")


def version_of(header: dict[str, Any]) -> int:
    """The version of the format that a log with this header has."""
    return SCORED if header.get("scores") else VERSION if header.get("normaliser") is None else NORMALISED


def encode_header(header: dict[str, Any]) -> bytes:
    payload = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = PREFIX.pack(MAGIC, version_of(header), len(payload)) + payload
    return body + CRC.pack(zlib.crc32(body))


def encode_step(step: int, coefficients: Sequence[float], loss: float, lrs: Sequence[float], chain: int) -> bytes:
    """Encodes a step-record; ``lrs`` are all numbers after the loss; ``chain`` is the previous checksum."""
    body = step_struct(len(coefficients), len(lrs)).pack(step, *coefficients, in_float32(loss), *lrs)
    return body + CRC.pack(zlib.crc32(body, chain))


def encode_change(change: dict[str, Any], chain: int) -> bytes:
    payload = json.dumps(change, separators=(",", ":")).encode()
    body = CHANGE_PREFIX.pack(CHANGE, len(payload)) + payload
    return body + CRC.pack(zlib.crc32(body, chain))


@dataclass
class Parsed:
    """The parsed contents of a log.

    Attributes:
        header: the decoded JSON.
        steps: all complete steps, in order.
        offsets: byte offset of each step.
        checkpoints: the steps at which the writing of a checkpoint began.
        changes: number of change-records.
        settings, rule, draws, merged, next_step, num_probes: their values after the last record.
        rollback, failed: those of the next step. If the log ends here, that step was not done.
        pending: byte offset of the change-record with them.
        end: byte offset of the end of the last good record; anything after it is damaged.
        chain: checksum of the last good record.
        torn: number of bytes after ``end`` if they are an incomplete record.
        corrupt: what is wrong at ``end``, if it is more than a torn tail.
        followed: whether good steps come after the damage.
    """

    header: dict[str, Any]
    settings: Settings
    next_step: int
    rule: Any
    end: int
    chain: int
    num_probes: int
    steps: list[LoggedStep] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    changes: int = 0
    draws: bool = False
    merged: bool = False
    rollback: Rollback | None = None
    failed: bool = False
    pending: int = 0
    torn: int = 0
    corrupt: str | None = None
    followed: bool = False

    @property
    def normalised(self) -> bool:
        """Whether the steps are normalised."""
        return self.header.get("normaliser") is not None

    @property
    def scored(self) -> bool:
        """Whether the steps have scores."""
        return bool(self.header.get("scores"))

    @property
    def rates(self) -> int:
        """How many learning rates the next step-record has."""
        return 1 + max(self.settings.columns)

    @property
    def layout(self) -> struct.Struct:
        """The layout of the next step-record."""
        return step_struct(self.num_probes, self.rates + self.normalised + 4 * self.scored)


def parse(data: bytes, name: str) -> Parsed:
    """Parses a log.

    Args:
        data: the bytes of the whole file.
        name: name of the log, for messages.

    Raises:
        StateError: the data is not a log, or its header is damaged.
    """
    header, end = _header(data, name)
    settings = Settings.from_dict(header["settings"])
    chain = CRC.unpack_from(data, end - CRC.size)[0]
    parsed = Parsed(header, settings, header["first_step"], header["rule"], end, chain, header["num_probes"])
    while parsed.end < len(data):
        problem = _record(data, parsed)
        if problem is None:
            continue
        parsed.followed = _another(data, parsed)
        if problem == "torn" and not parsed.followed:
            parsed.torn = len(data) - parsed.end
        else:
            parsed.corrupt = f"{name} is corrupt at byte {parsed.end}, after step {parsed.next_step - 1}: " + (
                "a record has another length than it states" if problem == "torn" else problem
            )
        break
    return parsed


def _header(data: bytes, name: str) -> tuple[dict[str, Any], int]:
    if not data.startswith(MAGIC[: len(data)]) or not data:
        raise StateError(f"{name} is not a seed log: it begins with {data[:8]!r} instead of {MAGIC!r}")
    if len(data) < PREFIX.size:
        raise StateError(f"{name} is damaged: it ends within the header")
    _, version, length = PREFIX.unpack_from(data)
    if version not in (VERSION, NORMALISED, SCORED):
        raise StateError(
            f"{name} is a seed log of format {version}; this version of zo_core reads formats up to {SCORED}"
        )
    end = PREFIX.size + length + CRC.size
    if len(data) < end:
        raise StateError(f"{name} is damaged: it ends within the header")
    if CRC.unpack_from(data, end - CRC.size)[0] != zlib.crc32(data[: end - CRC.size]):
        raise StateError(f"{name} is damaged: the checksum of its header is wrong")
    try:
        header = unpacked(data[PREFIX.size : end - CRC.size], deflated=True)
        check_header(header)
    except ValueError as error:
        raise StateError(f"{name} has a header that cannot be read: {error}") from error
    if version != version_of(header):
        raise StateError(f"{name} has a header that cannot be read: it is one of format {version_of(header)}")
    return header, end


def _record(data: bytes, parsed: Parsed) -> str | None:
    """Adds the record at ``parsed.end`` to ``parsed``; returns what is wrong with it, or None."""
    at, rest = parsed.end, len(data) - parsed.end
    if rest < 8:
        return "torn"
    first, second = CHANGE_PREFIX.unpack_from(data, at)
    layout, num_probes = parsed.layout, parsed.num_probes
    size = (CHANGE_PREFIX.size + second if first == CHANGE else layout.size) + CRC.size
    if rest < size:
        return "torn"
    body = data[at : at + size - CRC.size]
    checksum = CRC.unpack_from(data, at + size - CRC.size)[0]
    if zlib.crc32(body, parsed.chain) != checksum:
        return "the checksum of a record is wrong, or the record belongs elsewhere"
    if first == CHANGE:
        try:
            change = unpacked(body[CHANGE_PREFIX.size :], deflated=False)
            check_change(change, len(parsed.header["base"]["slots"]), parsed.next_step)
        except ValueError as error:
            return f"a change-record cannot be read: {error}"
        _apply_change(change, parsed)
    else:
        values = layout.unpack(body)
        if first != parsed.next_step:
            return f"step {parsed.next_step} is expected, but step {first} follows"
        coefficients, loss, numbers = values[1 : 1 + num_probes], values[1 + num_probes], values[2 + num_probes :]
        state = numbers[parsed.rates] if parsed.normalised else 0.0
        multipliers = numbers[: parsed.rates] + parsed.settings.eps + parsed.settings.weight_decay
        if not can_be_applied(coefficients, multipliers, state):
            return f"step {first} has a coefficient or a learning rate that no update can have"
        parsed.steps.append(
            LoggedStep(
                first,
                () if math.isnan(coefficients[0]) else coefficients,
                loss,
                tuple(numbers[column] for column in parsed.settings.columns),
                parsed.settings,
                parsed.draws,
                parsed.rule,
                parsed.header["noise"],
                parsed.merged,
                numbers[parsed.rates] if parsed.normalised else None,
                parsed.rollback,
                Scores(*numbers[-4:]) if parsed.scored and not math.isnan(numbers[-1]) else None,
                parsed.failed,
            )
        )
        parsed.merged, parsed.rollback, parsed.failed = False, None, False
        parsed.offsets.append(at)
        parsed.next_step = first + 1
    parsed.end, parsed.chain = at + size, checksum
    return None


def _apply_change(change: dict[str, Any], parsed: Parsed) -> None:
    """Applies a change-record; entries that this version does not know are only information for people."""
    parsed.changes += 1
    if "settings" in change:
        parsed.settings = Settings.from_dict(change["settings"])
    parsed.rule = change.get("rule", parsed.rule)
    parsed.num_probes = change.get("num_probes", parsed.num_probes)
    parsed.draws = change.get("draws", parsed.draws)
    parsed.merged = change.get("merged", parsed.merged)
    parsed.next_step = change.get("next_step", parsed.next_step)
    if "rollback" in change:
        parsed.rollback, parsed.pending = Rollback(**change["rollback"]), parsed.end
    if change.get("failed"):
        parsed.failed, parsed.pending = True, parsed.end
    if "checkpoint" in change:
        parsed.checkpoints.append(change["checkpoint"])


def _another(data: bytes, parsed: Parsed) -> bool:
    """Whether there is a good step-record after ``parsed.end``; the damage is then not a torn tail."""
    layout = parsed.layout
    last = min(len(data) - layout.size - CRC.size + 1, parsed.end + 4 + SEARCHED // layout.size)
    for at in range(parsed.end + 4, last):
        body = data[at : at + layout.size]
        chain = CRC.unpack_from(data, at - 4)[0]
        if zlib.crc32(body, chain) == CRC.unpack_from(data, at + layout.size)[0]:
            return True
    return False
