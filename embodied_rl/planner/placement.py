"""Which devices simulate, infer and train, and when: one description, of which collocated, hybrid and disaggregated are
values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from embodied_rl.errors import UserError
from embodied_rl.planner.costs import Memory, Work


@dataclass(frozen=True)
class Placement:
    """Stages on the same devices share them: without staleness they take turns anyway."""

    simulate: range
    """Devices; none where simulators are processes on CPU cores."""
    infer: range
    train: range
    groups: int = 1
    """Of environments, S: while the policy decides for one, the others are stepped."""
    staleness: int = 0
    """Batches by which the weights that collect may be behind; from 1 on, collecting and learning go on at once."""

    @property
    def kinds(self) -> set[tuple[bool, bool, bool]]:
        """What there is of devices that (simulate, infer, train)."""
        roles = self.simulate, self.infer, self.train
        borders = {border for devices in roles for border in (devices.start, devices.stop)}
        found = {(at in self.simulate, at in self.infer, at in self.train) for at in borders}
        return found - {(False, False, False)}

    @property
    def mode(self) -> str:
        """Which kind of placement this is: "cpu" (nothing needs a device), "disaggregated" (the learner has devices of
        its own), "hybrid" (it has those of the simulators and of the policy, which are different ones) or "collocated"
        (all have the same)."""
        if not self.kinds:
            return "cpu"
        if not any(train and (simulate or infer) for simulate, infer, train in self.kinds):
            return "disaggregated"
        apart = self.simulate and not any(simulate and infer for simulate, infer, _ in self.kinds)
        return "hybrid" if apart else "collocated"

    def switches(self, memory: Memory, rows: int, limit: float) -> bool:
        """Whether stages must leave the devices that they share to each other, because they do not fit together in
        `limit` bytes. Raises `UserError` when one does not even fit alone, or may not leave as it is never idle."""
        together = 0
        for simulates, infers, trains in self.kinds:
            collect, train = infers * memory.infer, trains * memory.train
            if simulates:
                collect += memory.simulate * -(-rows // len(self.simulate))
            if max(collect, train) > limit:
                stage = "the learner" if train > limit else "collecting"
                raise UserError(
                    f"{stage} needs {max(collect, train) / 2**30:.1f} GiB, a device has {limit / 2**30:.1f}"
                )
            together = max(together, collect + train)
        if together > limit and self.staleness:
            raise UserError(f"{together / 2**30:.1f} GiB do not fit in {limit / 2**30:.1f} at the same time")
        return together > limit


class Seconds(NamedTuple):
    """Of every stage in a placement, alone on its devices."""

    simulate: float
    """A chunk of one group."""
    infer: float
    """A decision of one group."""
    record: float
    train: float
    sync: float
    switch: float
    """All there is in an iteration."""
    sharing: int
    """Groups whose simulators share a device."""
    cores: dict[str, float]
    """That a call of simulate, infer, record or train keeps busy."""

    def slower(self, times: float, inside: bool) -> Seconds:
        """What the process itself does takes so many times longer; `inside`: simulating, too."""
        longer = {name: times * getattr(self, name) for name in ("infer", "record", "train")}
        return self._replace(**longer, simulate=self.simulate * (times if inside else 1.0))


def seconds(work: Work, placement: Placement, switches: bool = False) -> Seconds:
    """Raises `UserError` where environments or groups cannot be dealt out evenly to the devices; a batch that cannot is
    learned from as fast as its largest share."""
    costs, groups = work.costs, placement.groups
    rows = _parts(work.rows, groups, "environments", "groups")
    if placement.simulate:
        devices = len(placement.simulate)
        if devices % groups and groups % devices:
            raise UserError(f"{groups} groups cannot be dealt out to {devices} simulating devices")
        stepping, sharing = max(1, devices // groups), max(1, groups // devices)
        _parts(rows, stepping, "environments of a group", "devices")
    else:
        stepping, sharing = work.processes / groups, 1
        if stepping < 1:
            raise UserError(f"{groups} groups need as many simulator processes, there are {work.processes}")
    inferring, training = max(1, len(placement.infer)), max(1, len(placement.train))
    _parts(rows, inferring, "environments of a group", "devices")
    alone = Seconds(
        simulate=costs.simulate.seconds(rows, stepping),
        infer=costs.infer.seconds(rows, inferring),
        record=costs.record.seconds(rows, inferring),
        train=costs.train.seconds(-(-work.batch // training)),
        sync=costs.sync,
        switch=2 * costs.switch * switches,
        sharing=sharing,
        cores={
            "simulate": costs.simulate.cores * stepping,
            "infer": costs.infer.cores,
            "record": costs.record.cores,
            "train": costs.train.cores,
        },
    )
    return alone.slower(costs.overlap, work.inside) if placement.staleness else alone


def _parts(count: int, parts: int, what: str, whose: str) -> int:
    if count % parts:
        raise UserError(f"{count} {what} cannot be dealt out evenly to {parts} {whose}")
    return count // parts
