# What is done to requests before their target has them: rules, and the gate of a disk's queues.

#: What a rule does, by name.
cdef dict ACTIONS = {
    "delay": PU_ACT_DELAY,
    "hang": PU_ACT_HANG,
    "limit": PU_ACT_LIMIT,
    "fail": PU_ACT_FAIL,
    "drop": PU_ACT_DROP,
    "tear": PU_ACT_TEAR,
    "misdirect": PU_ACT_MISDIRECT,
    "rot": PU_ACT_ROT,
    "stale": PU_ACT_STALE,
}


cdef pu_bool ask_when(void *context, uint32_t op, uint64_t offset,
                      uint64_t length) noexcept with gil:
    when = <object>context
    try:
        return bool(when(OPS[op & 31], offset, length))
    except BaseException:
        logging.getLogger("pyublk.faults").exception(
            "a rule's `when` raised: the rule does nothing to this request"
        )
        return False


@cython.final
cdef class GateRule:
    """One rule; whoever has it checks its arguments."""

    cdef pu_rule *rule
    cdef object when

    def __init__(self, str action, *, uint32_t ops, uint64_t begin=0, uint64_t end=0,
                 bint jumps=False, when=None, uint64_t nth=0, bint every=False, uint64_t times=0,
                 double probability=1.0, uint64_t seed=0, int error=0, delays=(),
                 uint32_t amount=0, uint64_t place=0, double request_cost=0.0,
                 double byte_cost=0.0, double burst=0.0):
        cdef pu_rule_spec spec
        if self.rule != NULL:
            raise RuntimeError("this rule is made already")
        numbers = array("q", [int(delay * 1e9) for delay in delays] or [0])
        cdef const int64_t[::1] numbers_view = numbers
        memset(&spec, 0, sizeof(spec))
        spec.action = ACTIONS[action]
        spec.ops = ops
        spec.begin = begin
        spec.end = end
        spec.jumps = jumps
        if when is not None:
            spec.when = ask_when
            spec.context = <void *>when
            self.when = when
        spec.nth = nth
        spec.every = every
        spec.times = times
        spec.chance = <uint64_t>(probability * <double>PU_ALWAYS_FIRES)
        spec.seed = seed
        spec.error = error
        spec.delays_ns = &numbers_view[0]
        spec.nr_delays = <uint32_t>len(delays)
        spec.amount = amount
        spec.place = place
        spec.request_ns = request_cost * 1e9
        spec.byte_ns = byte_cost * 1e9
        spec.burst_ns = <int64_t>(burst * 1e9)
        self.rule = pu_rule_new(&spec)
        if self.rule == NULL:
            raise MemoryError()

    def __dealloc__(self):
        pu_rule_put(self.rule)

    def counts(self):
        cdef uint64_t matched, fired
        with nogil:
            pu_rule_counts(self.rule, &matched, &fired)
        return matched, fired


@cython.final
cdef class Gate:
    """The rules of one disk, whose queues outlive neither it nor them."""

    cdef pu_rules rules
    cdef list called  # what rules ask: some queue may be about to, also for one that was removed

    def __cinit__(self):
        pu_rules_init(&self.rules)
        self.called = []

    def __dealloc__(self):
        pu_rules_destroy(&self.rules)

    def exchange(self, rules):
        cdef uint32_t count = <uint32_t>len(rules)
        cdef GateRule rule
        cdef int error
        cdef pu_rule **now = <pu_rule **>calloc(count + 1, sizeof(pu_rule *))
        if now == NULL:
            raise MemoryError()
        try:
            for i, each in enumerate(rules):
                rule = <GateRule?>each
                now[i] = rule.rule
                if rule.when is not None and rule.when not in self.called:
                    self.called.append(rule.when)
            with nogil:
                error = pu_rules_exchange(&self.rules, now, count)
        finally:
            free(now)
        if error < 0:
            raise MemoryError()

    def release(self, GateRule rule=None):
        cdef pu_rule *one = NULL if rule is None else rule.rule
        with nogil:
            pu_rules_release(&self.rules, one)

    def suspend(self, bint suspended):
        with nogil:
            pu_rules_open(&self.rules, suspended)

    def set_size(self, uint64_t size, uint64_t zone_size=0):
        pu_rules_set_size(&self.rules, size, zone_size)
