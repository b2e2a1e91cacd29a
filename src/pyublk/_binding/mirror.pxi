# Mirrors: the state of their legs, which targets change and queues follow.


cdef class MirrorLayout(Layout):
    """The same bytes in every file, its legs."""

    MAX_LEGS = PU_MAX_LEGS

    cdef pu_mirror mirror

    def __init__(self, files, uint64_t size, *, leg_timeout=None):
        if not 1 <= len(files) <= PU_MAX_LEGS:
            raise ValueError(f"a mirror has 1 to {PU_MAX_LEGS} legs, not {len(files)}")
        cdef int64_t timeout_ns = 0 if leg_timeout is None else nanoseconds(leg_timeout)
        self.fill(PU_LAYOUT_MIRROR, size, list(files), 0)
        if pu_mirror_init(&self.mirror, &self.layout, timeout_ns) < 0:
            raise MemoryError("a mirror of this size does not fit into memory")
        self.policy = pu_mirrored(&self.mirror)

    def __dealloc__(self):
        pu_mirror_destroy(&self.mirror)

    cdef int tell(self, Queue queue, pu_mapped *mapped, object leg_failed) except -1:
        cdef pu_leg_failure failure
        while pu_mirrored_next_failure(mapped, &failure):
            leg_failed(failure.leg, failure.error, failure.file_generation)
        pu_mirrored_recorded(mapped)
        return 0

    def leg_state(self, uint32_t leg):
        self.check_leg(leg)
        return pu_mirror_leg_state(&self.mirror, leg)

    def set_leg_state(self, uint32_t leg, int state):
        self.check_leg(leg)
        pu_mirror_set_leg(&self.mirror, leg, <pu_leg_state>state)

    def fail_leg(self, uint32_t leg, file_generation=None):
        """Leaves a leg alone from now on, and holds writes until `recorded`. False, and nothing is
        done, for one that has failed, whose `file_generation` is another now, or that is the last
        in step, which is never given up."""
        self.check_leg(leg)
        if file_generation is None:
            file_generation = pu_mirror_file_generation(&self.mirror, leg)
        return pu_mirror_fail_leg(&self.mirror, leg, file_generation)

    @property
    def recorded(self):
        """Whether all legs that have failed are on record; no write is done while not."""
        return not pu_mirror_leg_bits(&self.mirror).unrecorded

    def set_recorded(self):
        pu_mirror_set_recorded(&self.mirror)

    def leg_errors(self, uint32_t leg):
        self.check_leg(leg)
        return self.mirror.legs[leg].errors

    def leg_orphans(self, uint32_t leg):
        """Operations that a leg's file, and the one before, still hold, though nobody waits for
        them any more."""
        self.check_leg(leg)
        return (pu_mirror_orphans(&self.mirror, leg, False),
                pu_mirror_orphans(&self.mirror, leg, True))

    cdef int check_leg(self, uint32_t leg) except -1:
        if leg >= self.layout.nr_files:
            raise ValueError(f"there is no leg {leg}")
        return 0

    def replace_file(self, uint32_t index, int fd, bint memory, bint device, file_generation=None):
        """The queues take it up with their next request."""
        self.check_leg(index)
        if file_generation is None:
            file_generation = pu_mirror_file_generation(&self.mirror, index)
        pu_mirror_replace_file(&self.mirror, index, fd, memory, device, file_generation)

    @property
    def region_bytes(self):
        return self.mirror.writes.bytes

    def block_writes(self, region=None):
        """No write of a mirror begins in this region (None: any may); `wake` the queues then."""
        cdef uint64_t number = PU_NO_REGION if region is None else self.checked_region(region)
        pu_regions_block(&self.mirror.writes, number)

    def is_drained(self, region):
        """Whether no write to the region is under way."""
        return pu_regions_are_drained(&self.mirror.writes, self.checked_region(region))

    cdef uint64_t checked_region(self, object region) except? 0:
        if not 0 <= region < (self.layout.size + self.mirror.writes.bytes - 1) // (
            self.mirror.writes.bytes
        ):
            raise ValueError(f"there is no region {region}")
        return region
