"""Where and how VSC-Swin compresses: one configuration, of which the paper's and the released schedule are presets."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isqrt
from typing import Any

from deepmsi.errors import UserError

# Tokens that a frame may have: rows reserved beyond them would be memory for nothing.
MOST = 65536


@dataclass(frozen=True)
class Schedule:
    """Which blocks compress, what they keep, and how the tokens that are left lie.

    Attributes:
        blocks: (stage, block) of each compressing block, counted from 0 and in order. None means blocks 0, 2 and 4
            (the unshifted ones) of the stage before the last, as far as it has them.
        layout: ``"packed"`` leaves every token at its row and column; ``"regrid"`` lays the kept tokens, in their
            order, on a smaller square grid, and needs ``keep`` a square number.
        keep: How many tokens each compressing block keeps (one number, or one for each); None: those above the
            threshold.
        capacity: Rows reserved for a frame after each compressing block (one number, or one for each). Shapes are then
            static in threshold mode, too.
        norm: Whether a layer norm follows the compression (the paper's); without it pretrained activations stay as
            they are.
        guide_weight: λ at the start.
        temperature, standardize, threshold, min_keep, fuse_threshold, fuse_alpha: As in
            :func:`deepmsi.ops.vsc_compress`.
    """

    blocks: tuple[tuple[int, int], ...] | None = None
    layout: str = "packed"
    keep: int | tuple[int, ...] | None = None
    capacity: int | tuple[int, ...] | None = None
    norm: bool = True
    guide_weight: float = 0.5
    temperature: float = 1.0
    standardize: bool = True
    threshold: float = 0.3
    min_keep: int = 1
    fuse_threshold: float = 0.6
    fuse_alpha: float = 0.9

    @property
    def static(self) -> bool:
        """Whether every shape is known beforehand, so that nothing waits for the device."""
        return self.keep is not None or self.capacity is not None

    @staticmethod
    def resolve(
        schedule: "str | Mapping[str, Any] | Schedule | None",
        depths: Sequence[int],
        overrides: Mapping[str, Any] | None = None,
    ) -> "Schedule | None":
        """Return the schedule for a backbone: every block named and one ``keep`` and ``capacity`` for each.

        Args:
            schedule: A preset's name, the fields of a schedule as a mapping, a schedule, or None for no compression.
            depths: Number of blocks of each stage of the backbone.
            overrides: Fields that take the place of the preset's.

        Raises:
            UserError: A name, a field or a value is not one of a schedule, or does not fit the backbone.
        """
        if schedule is None:
            return None
        if isinstance(schedule, str):
            if schedule not in PRESETS:
                raise UserError(f"schedule {schedule!r} is none of {', '.join(PRESETS)}: name one, or give its fields")
            schedule = PRESETS[schedule]
        elif isinstance(schedule, Mapping):
            schedule = Schedule(**_known(schedule))
        if overrides:
            schedule = replace(schedule, **_known(overrides))
        return schedule._bound(depths)

    def _bound(self, depths: Sequence[int]) -> "Schedule":
        if self.layout not in ("packed", "regrid"):
            raise UserError(f"schedule: layout must be packed or regrid, not {self.layout!r}")
        if self.layout == "regrid" and self.keep is None:
            raise UserError("schedule: the regrid layout needs keep, a square number: set keep, or layout packed")
        for name, (kind, allowed, words) in _ALLOWED.items():
            value = getattr(self, name)
            if not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool) and allowed(value)):
                raise UserError(f"schedule: {name} must be {words}, not {value!r}")
        blocks = self.blocks
        if blocks is None:
            stage = max(len(depths) - 2, 0)
            blocks = tuple((stage, block) for block in (0, 2, 4) if block < depths[stage])
        else:
            try:
                blocks = tuple((stage, block) for stage, block in blocks)
            except (TypeError, ValueError):
                blocks = ()
            if any(type(number) is not int for pair in blocks for number in pair) or not blocks:
                raise UserError(f"schedule: blocks must be pairs [stage, block], not {self.blocks!r}") from None
            for stage, block in blocks:
                if not (0 <= stage < len(depths) and 0 <= block < depths[stage]):
                    raise UserError(
                        f"schedule: there is no block {block} in stage {stage}: the stages have "
                        f"{', '.join(map(str, depths))} blocks, counted from 0"
                    )
            if list(blocks) != sorted(set(blocks)):
                raise UserError(f"schedule: blocks must be different and in order, not {self.blocks!r}")
        preset = self.blocks is None
        keep = _one_each("keep", self.keep, len(blocks), preset)
        if self.layout == "regrid" and keep is not None:
            for kept in keep:
                if isqrt(kept) ** 2 != kept:
                    raise UserError(f"schedule: the regrid layout needs square numbers to keep, not {kept}")
        capacity = _one_each("capacity", self.capacity, len(blocks), preset)
        lower, least = "min_keep", (self.min_keep,) * len(blocks)
        for name, numbers in (("keep", keep), ("capacity", capacity)):
            if numbers is not None:
                if any(number < floor for number, floor in zip(numbers, least, strict=True)):
                    raise UserError(f"schedule: {name} must be no less than {lower}, {least}, not {numbers}")
                lower, least = name, numbers
        return replace(self, blocks=blocks, keep=keep, capacity=capacity)


PRESETS: dict[str, Schedule] = {
    "paper": Schedule(),
    "released": Schedule(layout="regrid", keep=(196, 144, 100)),
}

# What vsc_compress takes: to be told when the schedule is read, and not by the first batch.
_ALLOWED: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "norm": (bool, lambda _: True, "true or false"),
    "standardize": (bool, lambda _: True, "true or false"),
    "guide_weight": ((int, float), lambda x: 0 < x < 1, "a number between 0 and 1"),
    "temperature": ((int, float), lambda x: 0 < x < inf, "a number above 0"),
    "threshold": ((int, float), lambda x: 0 <= x < inf, "a number from 0"),
    "min_keep": (int, lambda x: x >= 1, "a whole number from 1"),
    "fuse_threshold": ((int, float), lambda x: -1 <= x <= 1, "a number from -1 to 1"),
    "fuse_alpha": ((int, float), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
}


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(Schedule)]
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise UserError(
                f"schedule: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f": {', '.join(names)}")
            )
    return {key: _frozen(value) for key, value in given.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _one_each(name: str, value: int | tuple[int, ...] | None, count: int, preset: bool) -> tuple[int, ...] | None:
    """Return one number for each compressing block; the default blocks take the first of a longer list."""
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if preset and len(numbers) > count:
        numbers = numbers[:count]
    if len(numbers) != count or any(type(number) is not int or not 1 <= number <= MOST for number in numbers):
        raise UserError(
            f"schedule: {name} must be from 1 to {MOST}, one number or one for each of {count} blocks: {value!r}"
        )
    return numbers
