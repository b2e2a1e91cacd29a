# What the C core offers (see the headers in _core/ for the contracts).

cdef extern from "Python.h":
    int Py_AddPendingCall(int (*)(void *) noexcept, void *) noexcept nogil

cdef extern from *:
    """
    /* The calling thread's number, which no other thread ever has: an ident, or an id of the
     * kernel's, goes to the next thread when this one is over. */
    static inline uint64_t pu_this_thread(void)
    {
        static uint64_t last;
        static _Thread_local uint64_t number;

        if (!number)
            number = __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
        return number;
    }

    #ifdef Py_GIL_DISABLED
    /* No telling, unless the object is this thread's and no other has ever counted itself in: then
     * there is nobody who could take one more meanwhile. */
    static inline int PU_REFERENCES(PyObject *o)
    {
        if (o->ob_tid != _Py_ThreadId() || __atomic_load_n(&o->ob_ref_shared, __ATOMIC_ACQUIRE))
            return INT_MAX;
        return (int)o->ob_ref_local;
    }
    #define PU_ALONE(o, references) 0
    #else
    #define PU_REFERENCES(o) Py_REFCNT(o)
    /* Whether there are only these references, and no other thread can take one more meanwhile. */
    #define PU_ALONE(o, references) (Py_REFCNT(o) == (references))
    #endif
    """
    uint64_t pu_this_thread()
    int PU_REFERENCES(PyObject *o)
    bint PU_ALONE(PyObject *o, int references)

cdef extern from *:
    """
    #define PU_RELEASED(o) (((PyMemoryViewObject *)(o))->flags & _Py_MEMORYVIEW_RELEASED)

    /* Whether nobody but the holder of this one reference sees a memoryview's memory: neither this
     * view, which may be released, nor a slice or cast of it, nor what took a buffer from it. What
     * cannot be told for sure is no. */
    static inline int PU_UNSEEN(PyObject *o)
    {
        PyMemoryViewObject *view = (PyMemoryViewObject *)o;

        return PU_REFERENCES(o) == 1 && view->exports == 0 && !PU_RELEASED(o) &&
               view->mbuf->exports == 1;
    }
    """
    bint PU_RELEASED(PyObject *o) noexcept
    bint PU_UNSEEN(PyObject *o) noexcept

cdef extern from "_core/ring.h" nogil:
    int PU_SQE_FIXED_FILE
    int PU_OPCODE_NOP
    int PU_OPCODE_TIMEOUT
    int PU_OPCODE_TIMEOUT_REMOVE
    int PU_OPCODE_ASYNC_CANCEL
    int PU_OPCODE_READ
    int PU_OPCODE_WRITE
    int PU_OPCODE_MSG_RING
    int PU_REGISTER_FILES
    int PU_UNREGISTER_FILES
    int PU_REGISTER_EVENTFD
    int PU_SETUP_SQE128
    int PU_SETUP_CQE32
    int PU_FEAT_MIN_TIMEOUT

    struct pu_sqe:
        uint8_t opcode
        uint8_t flags
        uint16_t ioprio
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t op_flags
        uint64_t user_data
        uint16_t buf_index
        int32_t file_index
        uint64_t cmd[2]

    struct pu_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags

    struct pu_ring:
        int fd
        int process
        uint32_t setup_flags
        uint32_t features
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t *k_cq_overflow
        uint64_t enters

    ctypedef void (*pu_over)(void *, uint64_t, int32_t) noexcept nogil
    int pu_ring_open(pu_ring *, uint32_t, uint32_t, uint32_t, uint32_t)
    void pu_ring_close(pu_ring *)
    bint pu_ring_end(pu_ring *, const uint32_t *, pu_over, void *)
    int pu_ring_register(pu_ring *, uint32_t, const void *, uint32_t)
    int pu_ring_register_self(pu_ring *)
    pu_sqe *pu_ring_get_sqe(pu_ring *)
    uint32_t pu_ring_unsubmitted(const pu_ring *)
    int pu_ring_submit(pu_ring *, uint32_t, int64_t, uint32_t)
    int pu_ring_submit_and_wait(pu_ring *, uint32_t, int64_t, uint32_t)
    uint32_t pu_ring_ready(const pu_ring *)
    const pu_cqe *pu_ring_cqe(const pu_ring *, uint32_t)
    void pu_ring_advance(pu_ring *, uint32_t)

    int pu_fd_high(int)

cdef extern from "_core/ublk.h" nogil:
    int PU_OP_READ
    int PU_OP_WRITE
    int PU_OP_FLUSH
    int PU_OP_DISCARD
    int PU_OP_WRITE_ZEROES
    int PU_OP_COUNT
    int PU_OP_ZONE_APPEND
    int PU_OP_REPORT_ZONES
    uint32_t PU_FLAG_FUA
    uint64_t PU_USER_COPY_INTEGRITY
    int PU_SECTOR_SHIFT
    int PU_ZONE_BYTES
    uint32_t PU_FLAG_NOUNMAP
    uint32_t PU_FLAG_INTEGRITY
    uint32_t PU_FLAG_SHMEM_ZC

    struct pu_desc:
        uint32_t op_flags
        uint32_t nr_sectors
        uint64_t start_sector
        uint64_t addr

    uint64_t pu_desc_offset(const pu_desc *)

    struct pu_ctrl_cmd:
        uint32_t dev_id
        uint16_t queue_id
        uint16_t len
        uint64_t addr
        uint64_t data
        uint16_t dev_path_len

cdef extern from "_core/shared.h" nogil:
    struct pu_shared:
        pass

    void pu_shared_put(pu_shared *, uint16_t, uint8_t *, uint64_t)
    void pu_shared_change(pu_shared *, uint32_t)

cdef extern from "_core/buffers.h" nogil:
    struct pu_buffers:
        size_t bytes

    pu_buffers *pu_buffers_new(uint16_t, size_t)
    void pu_buffers_free(pu_buffers *)
    void pu_buffers_unmap(const pu_buffers *, uint8_t *)

cdef extern from "_core/tag.h" nogil:
    enum:
        PU_TAG_FETCHING
        PU_TAG_OWNED

    struct pu_tag:
        bint fetched
        uint64_t zone_lba

    uint32_t pu_tag_generation(const pu_tag *)
    int pu_tag_state(const pu_tag *)

cdef extern from "_core/rule.h" nogil:
    enum pu_action:
        PU_ACT_DELAY
        PU_ACT_HANG
        PU_ACT_LIMIT
        PU_ACT_FAIL
        PU_ACT_DROP
        PU_ACT_TEAR
        PU_ACT_MISDIRECT
        PU_ACT_ROT
        PU_ACT_STALE

    uint64_t PU_ALWAYS_FIRES
    ctypedef bint pu_bool "bool"  # C's own, where the core calls a function of ours
    ctypedef pu_bool (*pu_when)(void *, uint32_t, uint64_t, uint64_t) noexcept

    struct pu_rule_spec:
        pu_action action
        uint32_t ops
        uint64_t begin
        uint64_t end
        bint jumps
        pu_when when
        void *context
        uint64_t nth
        bint every
        uint64_t times
        uint64_t chance
        uint64_t seed
        int32_t error
        const int64_t *delays_ns
        uint32_t nr_delays
        uint32_t amount
        uint64_t place
        double request_ns
        double byte_ns
        int64_t burst_ns

    struct pu_rule:
        pass

    pu_rule *pu_rule_new(const pu_rule_spec *)
    void pu_rule_put(pu_rule *)
    void pu_rule_counts(pu_rule *, uint64_t *, uint64_t *)

cdef extern from "_core/gate.h" nogil:
    struct pu_rules:
        pass

    void pu_rules_init(pu_rules *)
    void pu_rules_destroy(pu_rules *)
    int pu_rules_exchange(pu_rules *, pu_rule **, uint32_t)
    void pu_rules_release(pu_rules *, pu_rule *)
    void pu_rules_set_size(pu_rules *, uint64_t, uint64_t)
    void pu_rules_open(pu_rules *, bint)
    int64_t pu_gate_due(const pu_queue *)
    uint32_t pu_gate_kept(const pu_queue *)

cdef extern from "_core/queue.h" nogil:
    ctypedef int64_t (*pu_handler)(
        void *, uint32_t, uint32_t, uint64_t, uint64_t, void *
    ) noexcept nogil

    struct pu_counters:
        uint64_t requests[32]
        uint64_t bytes[32]
        uint64_t errors
        uint64_t enters
        uint64_t largest_batch
        uint64_t fallbacks

    struct pu_loopback:
        pass

    struct pu_queue:
        int cdev
        pu_ring ring
        pu_desc *desc
        pu_tag *tags
        uint16_t *ready
        uint32_t nr_ready
        uint16_t id
        uint16_t depth
        pu_loopback *loopback
        bint copies
        bint user_copy
        bint severed
        bint ending
        bint watched
        bint copying
        void *batch

    int pu_queue_fetch(pu_queue *)
    int pu_queue_wait(pu_queue *, int64_t)
    void pu_queue_carry_over(pu_queue *, uint32_t)
    int pu_queue_submit(pu_queue *)
    int64_t pu_now_ns() noexcept
    int64_t pu_tick_ns() noexcept
    int pu_queue_event_fd(pu_queue *)
    int pu_queue_watch(pu_queue *, int)
    int pu_queue_serve(pu_queue *, pu_handler, void *, bint)
    int pu_queue_turn(pu_queue *, pu_handler, void *, bint)
    bint pu_queue_pending(const pu_queue *)
    int PU_TURN_ROUNDS
    uint32_t pu_queue_held(const pu_queue *)
    void pu_queue_counters(const pu_queue *, pu_counters *)
    uint8_t *pu_queue_buffer(const pu_queue *, uint16_t)
    uint8_t *pu_queue_next_buffer(const pu_queue *, uint16_t)
    bint pu_queue_holds(const pu_queue *, uint16_t, uint32_t)

cdef extern from "_core/histogram.h" nogil:
    int PU_BUCKETS
    int PU_OTHERS
    int PU_READS
    int PU_WRITES
    int PU_FLUSHES
    int PU_DISCARDS
    int PU_WRITES_OF_ZEROES

    struct pu_histogram:
        uint64_t total_ns[6]
        uint64_t counts[6][256]

    uint64_t pu_histogram_bound(uint32_t)

cdef extern from "_core/trace.h" nogil:
    struct pu_trace:
        void *records
        int64_t began
        uint32_t device
        uint32_t cpu

    int pu_trace_open(pu_trace *, size_t)
    void pu_trace_close(pu_trace *)
    uint64_t pu_trace_kept(const pu_trace *)
    uint64_t pu_trace_lost(const pu_trace *)

cdef extern from "_core/tapping.h" nogil:
    bint pu_taps_trace(pu_queue *, pu_trace *)
    void pu_taps_read(const pu_queue *, pu_histogram *)

cdef extern from "_core/open.h" nogil:
    struct pu_queue_options:
        uint16_t id
        uint16_t depth
        uint16_t first_tag
        uint16_t tag_step
        uint64_t flags
        size_t buffer_bytes
        pu_buffers *buffers
        bint own_device
        uint32_t extra_entries
        const int *files
        uint32_t nr_files
        int64_t trim_after_ns
        uint32_t faults
        const pu_shared *client_memory
        pu_rules *rules

    void pu_io_flusher()
    int pu_queue_open(pu_queue *, int, const pu_queue_options *)
    bint pu_queue_close(pu_queue *)
    void pu_queue_free(pu_queue *)
    int pu_queue_sever(pu_queue *)

cdef extern from "_core/answer.h" nogil:
    int pu_queue_answer(pu_queue *, uint16_t, int64_t)
    int pu_queue_post(pu_queue *, uint16_t, uint32_t, int64_t)
    int pu_queue_answer_kept(pu_queue *, uint16_t, uint32_t, int64_t, bint, uint8_t **)
    void pu_queue_fail_held(pu_queue *, int)
    void pu_queue_wake(pu_queue *)

cdef extern from "_core/copy.h" nogil:
    int pu_queue_copy(pu_queue *, uint16_t, uint32_t, void *, uint64_t, uint64_t, uint64_t)
    void *pu_queue_shared(const pu_queue *, uint16_t)
    int pu_queue_fill_buffer(pu_queue *, uint16_t, uint32_t)

cdef extern from "_core/loopback.h" nogil:
    int pu_loopback_inject(pu_queue *, uint16_t, uint32_t, uint64_t, uint32_t)
    int32_t pu_loopback_result(const pu_queue *, uint16_t)

cdef extern from "sys/prctl.h" nogil:
    int PR_SET_NAME
    int prctl(int, ...)

cdef extern from "fcntl.h" nogil:
    int F_DUPFD_CLOEXEC
    int O_CLOEXEC
    int fcntl(int, int, ...)
    int c_open "open"(const char *, int, ...)

cdef extern from "_core/forked.h" nogil:
    int pu_process()
    void pu_fork_hold()
    void pu_fork_release()
    int pu_fork_add(int)
    void pu_fork_drop(int)

cdef extern from "_core/spawn.h" nogil:
    void pu_spawn_by(int)
    int pu_spawn_helper_for(const char *, int, int, int *, int *)

cdef extern from "_core/control.h" nogil:
    int PU_ASK_COMMAND
    int PU_ASK_WRITE
    int PU_ASK_GUARD
    int PU_ASK_UNGUARD
    int PU_ASK_PROGRAM
    int PU_ASK_GUARDED
    int PU_ASK_MEMORY
    int PU_ASK_READ_ONLY
    int PU_ASK_RESTARTED
    int PU_CONTROL_RING
    int PU_CONTROL_SUBMIT
    int PU_CONTROL_KILLED

    struct pu_ask:
        uint32_t kind
        uint32_t flags
        uint32_t cmd_op
        uint32_t hang_ms
        uint64_t cookie
        uint64_t file_offset
        uint64_t file_bytes
        pu_ctrl_cmd cmd

    struct pu_helper:
        pass

    struct pu_control:
        int32_t stage
        int32_t result
        uint8_t *buffer

    int pu_helper_get(pu_helper **, const char *, int)
    void pu_helper_put(pu_helper *)
    int pu_helper_pid(pu_helper *)
    bint pu_helper_is_ours(const pu_helper *)
    void pu_helper_tell(void (*)(int) noexcept nogil)
    int pu_control_begin(pu_control *, pu_helper *, pu_ask *, const void *, size_t, int)
    int pu_control_wait(pu_control *, int)
    bint pu_control_end(pu_control *)

cdef extern from "_core/watch.h" nogil:
    struct pu_watch:
        pass

    void pu_watch_begin(pu_watch *, const pu_queue *, void (*)() noexcept)
    void pu_watch_end(pu_watch *)
    void pu_watch_stop()

cdef extern from "_core/set.h" nogil:
    struct pu_set:
        uint32_t *ready
        uint32_t nr_ready

    int pu_set_open(pu_set *, uint32_t)
    void pu_set_close(pu_set *)
    int pu_set_add(pu_set *, pu_queue *)
    void pu_set_remove(pu_set *, uint32_t)
    int pu_set_wait(pu_set *, int64_t)
    void pu_set_wake(pu_set *)

cdef extern from "_core/lock.h" nogil:
    struct pu_lock:
        pass

    int pu_lock_init(pu_lock *, unsigned int, uint64_t)
    void pu_lock_destroy(pu_lock *)
    void pu_lock_read(pu_lock *, uint64_t, uint64_t)
    void pu_lock_write(pu_lock *, uint64_t, uint64_t)
    void pu_lock_unlock(pu_lock *, uint64_t, uint64_t)

cdef extern from "_core/ram.h" nogil:
    struct pu_ram:
        int file

    int pu_ram_init(pu_ram *, uint64_t, int)
    void pu_ram_destroy(pu_ram *)
    int64_t pu_ram_handle(void *, uint32_t, uint32_t, uint64_t, uint64_t, void *)
    uint64_t pu_ram_resident(pu_ram *)

cdef extern from "_core/null.h" nogil:
    int64_t pu_null_handle(void *, uint32_t, uint32_t, uint64_t, uint64_t, void *)


cdef int64_t nanoseconds(object seconds) except? -2:
    """None: for ever (-1)."""
    if seconds is None:
        return -1
    if seconds < 0:
        raise ValueError(f"timeout must not be negative, not {seconds!r} seconds")
    return <int64_t>(<double>seconds * 1e9)


cdef extern from "_core/layout.h" nogil:
    enum pu_layout_kind:
        PU_LAYOUT_TABLE
        PU_LAYOUT_STRIPE
        PU_LAYOUT_MIRROR
        PU_LAYOUT_PER_REQUEST

    struct pu_file:
        int fd
        bint memory
        bint device
        bint read_only

    struct pu_extent:
        uint64_t start
        uint64_t length
        uint64_t offset
        uint32_t file

    struct pu_layout:
        uint64_t size
        pu_file *files
        uint32_t nr_files
        pu_extent *extents
        uint64_t chunk
        bint defers_flushes
        pu_layout_kind kind

    int pu_layout_init(pu_layout *, pu_layout_kind, uint64_t, uint32_t, uint32_t)
    void pu_layout_destroy(pu_layout *)
    void pu_layout_set_file(pu_layout *, uint32_t, int, bint, bint)
    int pu_layout_resize(pu_layout *, uint64_t)
    uint64_t pu_layout_size(const pu_layout *)
    void pu_layout_map_memory(pu_layout *)
    void pu_layout_unmap_memory(pu_layout *)
    uint32_t pu_layout_version(const pu_layout *)

cdef extern from "_core/policy.h" nogil:
    struct pu_policy:
        pass

cdef extern from "_core/direct.h" nogil:
    const pu_policy pu_direct

cdef extern from "_core/mapped.h" nogil:
    struct pu_mapped:
        bint to_tell

    uint32_t pu_mapped_entries(const pu_policy *, uint16_t)
    int pu_mapped_open(pu_mapped *, pu_queue *, pu_layout *, const pu_policy *, uint32_t)
    void pu_mapped_close(pu_mapped *)
    int pu_mapped_turn(pu_mapped *, int64_t)
    int pu_mapped_plan(pu_mapped *, uint16_t, const pu_extent *, uint32_t)

cdef extern from "_core/deferred.h" nogil:
    bint pu_deferred_next(pu_mapped *, uint16_t *)
    void pu_deferred_resolve(pu_mapped *, uint16_t, uint32_t, int)

cdef extern from "_core/regions.h" nogil:
    uint64_t PU_NO_REGION

    struct pu_regions:
        uint64_t bytes

    void pu_regions_block(pu_regions *, uint64_t)
    bint pu_regions_are_drained(const pu_regions *, uint64_t)
    uint32_t pu_regions_begun(const pu_regions *, uint64_t)

cdef extern from "_core/mirror.h" nogil:
    unsigned int PU_MAX_LEGS

    enum pu_leg_state:
        PU_LEG_SYNCED
        PU_LEG_RESYNC
        PU_LEG_FAILED

    struct pu_leg:
        uint32_t errors

    struct pu_leg_bits:
        uint16_t unrecorded

    struct pu_mirror:
        pu_leg *legs
        pu_regions writes

    int pu_mirror_init(pu_mirror *, pu_layout *, int64_t)
    void pu_mirror_destroy(pu_mirror *)
    pu_leg_bits pu_mirror_leg_bits(const pu_mirror *)
    pu_leg_state pu_mirror_leg_state(const pu_mirror *, uint32_t)
    void pu_mirror_set_leg(pu_mirror *, uint32_t, pu_leg_state)
    bint pu_mirror_fail_leg(pu_mirror *, uint32_t, uint32_t)
    void pu_mirror_set_recorded(pu_mirror *)
    uint32_t pu_mirror_file_generation(const pu_mirror *, uint32_t)
    uint32_t pu_mirror_orphans(const pu_mirror *, uint32_t, bint)
    void pu_mirror_replace_file(pu_mirror *, uint32_t, int, bint, bint, uint32_t)

cdef extern from "_core/mirrored.h" nogil:
    struct pu_leg_failure:
        uint32_t leg
        uint32_t file_generation
        int error

    const pu_policy *pu_mirrored(pu_mirror *)
    bint pu_mirrored_next_failure(pu_mapped *, pu_leg_failure *)
    void pu_mirrored_recorded(pu_mapped *)
