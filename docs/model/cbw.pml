/* The protocol of src/cbwcore/_engine.pxd, _preserve.pxd, _copy.pxd and _snapshot.pxd: guest writes, the gate, copies that fail
 * or outlive their timeout, breaks, reads and block status, discards and jobs, close, arming of groups, frozen bitmaps.
 * README.md maps each step to the code and back, and says what is left out.
 *
 *   spin -a -DCASE_name [-DPOLICY_S] [-DMUT=n] cbw.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m20000
 *
 * All of it at once is more than can be searched, so there are cases, each searched exhaustively (tests/model/test_spin.py):
 * who takes part is chosen below. -DPOLICY_S is break-snapshot, else break-guest-write. Without MUT spin finds no violation and
 * no deadlock in any; each MUT takes one ordering away, and spin finds what comes of it in the case that test_spin.py names.
 * MUT=30 alone shows nothing, and README.md says why.
 *
 * What runs under one lock is one `atomic`; what is outside of any is a step of its own. A condition variable is `asleep`: who
 * waits goes on only when woken, or by its timeout.
 */
#if defined(CASE_protocol)              /* R1 to R3, R6 to R9: two writers and a reader */
#define WRITERS 2
#define READERS 1
#elif defined(CASE_readers)             /* the same of one cluster, with two readers */
#define WRITERS 2
#define READERS 2
#define N 1
#elif defined(CASE_patient)             /* nobody has a timeout: who is not woken hangs */
#define WRITERS 2
#define READERS 1
#define NO_TIMEOUT
#elif defined(CASE_discard)             /* discards of the snapshot under reads, copies and writes */
#define WRITERS 2
#define READERS 1
#define DISCARDS 1
#define NO_TIMEOUT
#ifdef POLICY_S
#define N 1
#endif
#elif defined(CASE_job)                 /* a job: read, store, give up, of each cluster */
#define WRITERS 2
#define JOBS 1
#elif defined(CASE_close)               /* a snapshot and then its disk are closed under everybody */
#define WRITERS 2
#define READERS 1
#define CLOSE
#define N 1
#elif defined(CASE_status)              /* R20 */
#define WRITERS 2
#define STATUS 1
#define DISCARDS 1
#define NO_TIMEOUT
#elif defined(CASE_two)                 /* R15: two snapshots of one disk; what is read for the first serves the second */
#define WRITERS 2
#define READERS 1                       /* of the one or the other */
#define NS 2
#define N 1
#ifdef POLICY_S
#define NO_TIMEOUT
#endif
#elif defined(CASE_arm)                 /* R10: a second snapshot is taken while there is one */
#define WRITERS 2
#define READERS 1
#define NS 2
#define N 1
#define ARM 1                           /* from this snapshot on */
#define NO_TIMEOUT
#elif defined(CASE_group)               /* R10: one T0 for two disks; each writer writes both */
#define WRITERS 2
#define READERS 1
#define NS 2
#define ND 2
#define N 1
#define ARM 0
#define NO_TIMEOUT
#elif defined(CASE_freeze)              /* a bitmap is frozen at T0, its successor records from then on; then commit or merge */
#define WRITERS 2
#define ARM 0
#define FREEZE
#define NO_TIMEOUT
#elif defined(CASE_freeze_armed)        /* the same with a snapshot that is there already */
#define WRITERS 1
#define NS 2
#define N 1
#define ARM 1
#define FREEZE
#else
#error "which case? see cbw.pml"
#endif

#ifndef N
#define N 2                             /* clusters of each disk */
#endif
#ifndef NS
#define NS 1                            /* snapshots */
#endif
#ifndef ND
#define ND 1                            /* disks */
#endif
#ifndef READERS
#define READERS 0
#endif
#ifndef DISCARDS
#define DISCARDS 0
#endif
#ifndef JOBS
#define JOBS 0
#endif
#ifndef STATUS
#define STATUS 0
#endif
#ifndef ARM
#define ARM NS                          /* those before it are armed from the start */
#endif
#ifndef MUT
#define MUT 0
#endif

#if ARM < NS || defined(CLOSE)
#define GATED                           /* else nobody shuts a gate, and who is in flight makes no difference */
#endif
#ifdef CLOSE
#define count_user(s, n) users[s] = users[s] + (n)
#else
#define count_user(s, n) skip           /* only close waits for them */
#endif

#define UNARMED 0
#define ARMED 1
#define BROKEN 2
#define CLOSED 3
#if ND == 2
#define disk_of(s) (s)
#else
#define disk_of(s) 0
#endif
#define D(d, c) ((d) * N + (c))
#define I(s, c) ((s) * N + (c))
#define J(w, s) ((w) * NS + (s))
#define SLEEPERS (WRITERS + DISCARDS + JOBS)

/* The disks. */
byte src[ND * N];
bool gate[ND];
byte flight[ND];                        /* guest writes in flight */
byte inside[ND];                        /* reads of the disk as such: none here; snapshots are closed before it */
bool closed[ND], gone[ND];              /* gone: its file is closed */
/* The snapshots. */
byte state[NS];
bool linked[NS];                        /* disk.snaps */
bool caused[NS];                        /* the sticky cause */
byte users[NS];
bool handle[NS];                        /* SnapshotCore.s: requests may begin */
bool freed[NS];                         /* target closed, maps given back */
bool need[NS * N], done[NS * N], access[NS * N], copying[NS * N];
byte frozen[NS * N], treads[NS * N], tgt[NS * N];
byte asleep[SLEEPERS + 1];              /* 1 + the snapshot whose condition it waits for */
/* What is known of T0, for the assertions alone. */
byte t0[NS * N];
bool had_t0[NS];
/* The copies: of writer w for snapshot s. */
byte result[WRITERS * NS];              /* 0 under way, 1 copied, 2 failed */
bool alone[WRITERS * NS];               /* its guest write has gone on without it */
byte old[WRITERS];                      /* the buffer, and whether there is one */
bool has_old[WRITERS];
/* Bitmaps. */
bool b_records, s_records, settled, merged;
bool b_bit[N], s_bit[N], at_t0[N];
bool before_t0[N], after_t0[N];         /* what was written */

byte i_, k_;                            /* of atomics alone, and 0 outside of them */

inline wake(s) {
  for (i_ : 0 .. SLEEPERS - 1) { if :: asleep[i_] == 1 + s -> asleep[i_] = 0 :: else fi };
  i_ = 0
}

#define held(s, c) (frozen[I(s, c)] > 0)
#define busy(s, c) (frozen[I(s, c)] > 0 || treads[I(s, c)] > 0 || copying[I(s, c)])

/* gate_shut(): one shutter at a time; then until nobody is in flight. gate_open(). */
inline shut(d) {
  atomic { !gate[d] -> gate[d] = true };
#if MUT != 17
  flight[d] == 0                                        /* 17: T0 does not drain */
#endif
}
inline reopen(d) { gate[d] = false }

inline break_snapshot(s) {                              /* snapshot_break(), in an atomic */
#if MUT != 10
  caused[s] = true;                                     /* 10: the state is there before the cause */
#endif
  state[s] = BROKEN;
#if MUT != 11
  wake(s)
#endif
}

/* copy_main(): of the writer itself, or of a helper; it may outlive its writer's patience. It reads for one snapshot and
 * leaves what it read to the writer, for the next. */
proctype copier(byte w; byte s; byte c) {
  byte b;
  if
  :: has_old[w] -> b = old[w]
  :: else -> assert(!gone[disk_of(s)]); b = src[D(disk_of(s), c)]        /* read_old() */
  fi;
  if
  :: true ->
#if MUT == 5
     atomic { if :: state[s] == ARMED -> done[I(s, c)] = true :: else fi };      /* 5: done before the target has it */
#endif
     assert(!freed[s]);
     tgt[I(s, c)] = b;                                  /* write_target() */
#if MUT == 6
     atomic { copying[I(s, c)] = false; wake(s) };    /* 6: the claim is given up before done is set */
#endif
     atomic {                                           /* finish_copy(), end_copy(), mark_copied() */
       copying[I(s, c)] = false;
       if
       :: state[s] == ARMED ->                          /* R8; R2: */
          assert(src[D(disk_of(s), c)] == t0[I(s, c)]);
          done[I(s, c)] = true
       :: else
       fi;
       if
       :: alone[J(w, s)]
       :: else ->
          result[J(w, s)] = 1;
#if NS > 1
          old[w] = b; has_old[w] = true
#endif
       fi;
       wake(s)
     }
  :: true ->                                            /* the copy fails: of the source, the target, or for want of space */
     atomic {
       copying[I(s, c)] = false;
       if :: alone[J(w, s)] :: else -> result[J(w, s)] = 2 fi;
       wake(s)
     }
  fi
}

proctype writer(byte w; byte d; byte v) {               /* guest_write() */
  byte c, s;
  bool in, pinned[NS];
#if N == 2
  if :: c = 0 :: w > 0 -> c = 1 fi;                     /* the clusters are alike: that of the first writer is called 0 */
#endif
again:
#ifdef GATED
#if MUT == 18
  if :: gate[d] -> !gate[d]; goto again :: else fi;     /* 18: it reads the gate, and then counts itself */
  flight[d]++;
#else
  flight[d]++;                                          /* enter_write() */
  if
  :: gate[d] -> flight[d]--; !gate[d]; goto again
  :: else
  fi;
#endif
  if :: closed[d] -> flight[d]--; goto end :: else fi;
#endif
#if MUT == 19
  if :: in -> in = false; goto io :: else fi;           /* 19: it does not look again after its copies */
#endif
#if NS == 1                                             /* needs_cbw(): the state, and then the map */
#ifdef POLICY_S
  in = state[0] == BROKEN;                              /* R7: whoever begins after the break */
#endif
#if MUT == 29
  if :: need[c] :: else -> goto io fi;                  /* 29: the map alone */
#else
  if
  :: state[0] == ARMED && linked[0] -> assert(!freed[0]); if :: need[c] :: else -> goto io fi
  :: else -> goto io
  fi;
#endif
#else
  in = false;
  s = 0;
  do
  :: s == NS -> break
  :: s < NS && linked[s] && disk_of(s) == d && state[s] == ARMED -> in = in || need[I(s, c)]; s++
  :: s < NS && !(linked[s] && disk_of(s) == d && state[s] == ARMED) -> s++
  od;
  if :: !in -> goto io :: else fi;
#endif
  atomic {                                              /* pass_snapshots(): those of now are pinned, then flight is left */
#if NS == 1 && defined(POLICY_S)
    assert(!in);                                        /* takes the fast path */
#endif
    s = 0;
    do
    :: s == NS -> break
    :: s < NS -> pinned[s] = linked[s] && disk_of(s) == d; s++
    od;
    s = 0
  };
#ifdef GATED
  flight[d]--;
#endif
next:                                                   /* snapshot_preserve() */
  if
  :: s == NS ->
     atomic {
#if MUT != 21
       has_old[w] = false; old[w] = 0;                  /* 21: what was read is kept for what is armed later */
#endif
       for (i_ : 0 .. NS - 1) { pinned[i_] = false };
       i_ = 0; s = 0; in = MUT == 19;
       goto again
     }
  :: s < NS && !pinned[s] -> s++; goto next
  :: s < NS && pinned[s]
  fi;
  atomic {
    if
    :: state[s] != ARMED -> s++; goto next
    :: state[s] == ARMED && !need[I(s, c)] -> s++; goto next
    :: else -> count_user(s, 1)
    fi
  };
look:
  atomic {                                              /* preserve_run(), and the end of snapshot_preserve() */
    if
    :: state[s] != ARMED || !need[I(s, c)] -> count_user(s, -1); wake(s); s++; goto next
    :: else
    fi;
#if MUT == 9
    if :: done[I(s, c)] -> goto early :: else fi;       /* 9: the disk is written before the frozen reads are waited for */
#endif
    if
#if MUT == 2 || MUT == 8
    :: done[I(s, c)] -> need[I(s, c)] = false; goto look                 /* 2: frozen reads are not waited for */
#else
#if MUT == 30
    :: done[I(s, c)] && !held(s, c) -> goto early         /* 30: the disk is written before need is cleared */
#else
    :: done[I(s, c)] && !held(s, c) -> need[I(s, c)] = false; goto look
#endif
#endif
#if MUT == 7
    :: done[I(s, c)] && held(s, c) -> need[I(s, c)] = false; has_old[w] = false; asleep[w] = 1 + s     /* 7: need is cleared before */
#else
    :: done[I(s, c)] && held(s, c) -> has_old[w] = false; asleep[w] = 1 + s      /* wait_for(), its buffer given back */
#endif
#if MUT != 8
    :: !done[I(s, c)] && copying[I(s, c)] -> has_old[w] = false; asleep[w] = 1 + s
    :: !done[I(s, c)] && !copying[I(s, c)] ->
#else
    :: !done[I(s, c)] && held(s, c) -> has_old[w] = false; asleep[w] = 1 + s     /* 8: it waits for frozen reads before done is set, not after */
    :: !done[I(s, c)] && !held(s, c) && copying[I(s, c)] -> has_old[w] = false; asleep[w] = 1 + s
    :: !done[I(s, c)] && !held(s, c) && !copying[I(s, c)] ->
#endif
#if MUT == 1
       need[I(s, c)] = false;                           /* 1: need is cleared before the target has the data */
#endif
       copying[I(s, c)] = true;                         /* copy_own() */
       run copier(w, s, c);
       goto mine
    fi
  };
  if
  :: asleep[w] == 0 -> goto look
#ifndef NO_TIMEOUT
  :: atomic { asleep[w] == 1 + s -> asleep[w] = 0; goto failed }         /* timed_out() */
#endif
  fi;
mine:                                                   /* until it has ended, the snapshot has, or its patience */
  atomic {
    if
    :: result[J(w, s)] == 1 -> result[J(w, s)] = 0; goto look
    :: result[J(w, s)] == 2 -> result[J(w, s)] = 0; goto failed
    :: result[J(w, s)] == 0 && state[s] != ARMED -> alone[J(w, s)] = true; goto look
    :: result[J(w, s)] == 0 && state[s] == ARMED -> asleep[w] = 1 + s
    fi
  };
  if
  :: asleep[w] == 0 -> goto mine
#ifndef NO_TIMEOUT
  :: atomic { asleep[w] == 1 + s && result[J(w, s)] == 0 -> asleep[w] = 0; alone[J(w, s)] = true; goto failed }
#endif
  fi;
failed:
#ifdef POLICY_S
#if MUT == 13
  goto early;                                           /* 13: the write is let go, and then the snapshot breaks */
#endif
  atomic {
    if :: state[s] == ARMED -> break_snapshot(s) :: else fi;
    count_user(s, -1);
#if MUT != 11
    wake(s);                                            /* 11: who waits is not told */
#endif
    for (i_ : 0 .. SLEEPERS - 1) { assert(asleep[i_] != 1 + s) };       /* R7: nobody waits for a broken snapshot */
    i_ = 0;
    s++
  };
#if MUT == 10
  caused[s - 1] = true;
#endif
  goto next;
#else
  atomic {
    count_user(s, -1); wake(s);
    if :: state[s] == ARMED -> goto end :: else -> s++; goto next fi     /* refused: this writer has not changed the disk */
  };
#endif
io:                                                     /* finish_write(): record() */
#ifdef FREEZE
  if
  :: b_records -> assert(!had_t0[ARM] || settled); b_bit[c] = true
  :: else
  fi;
  if :: s_records -> s_bit[c] = true :: else fi;
#endif
  atomic {                                              /* submit() */
    assert(!gone[d]);
    src[D(d, c)] = v;
#ifdef FREEZE
    if
    :: had_t0[ARM] -> after_t0[c] = true
    :: else -> before_t0[c] = true
    fi
#endif
  };
#ifdef GATED
  flight[d]--;
#endif
#if ND == 2
  if :: d == 0 -> d = 1; goto again :: else fi;         /* its next request, to the other disk */
#endif
  goto end;
#if MUT == 9 || MUT == 13 || MUT == 30
early:
  src[D(d, c)] = v;
  atomic {
#if MUT == 30
    need[I(s, c)] = false;
#endif
#if MUT == 13
    break_snapshot(s);
#endif
    count_user(s, -1); wake(s)
  };
#endif
end:
  atomic { has_old[w] = false; old[w] = 0 }
}

/* SnapshotCore.open() and done_with() */
#ifdef CLOSE
#define begin_request(s) atomic { if :: !handle[s] -> goto end :: else -> count_user(s, 1) fi }
#define end_request(s) atomic { count_user(s, -1); wake(s) }
#else
#define begin_request(s) skip
#define end_request(s) skip
#endif

/* snapshot_read() of one cluster: `r` and `ok`. */
inline read_run(s, c) {
  atomic {
    ok = state[s] == ARMED && access[I(s, c)];
    if :: state[s] == BROKEN -> assert(caused[s]) :: else fi;
    from_disk = !done[I(s, c)];
    if
    :: !ok
    :: ok && from_disk ->
#if MUT != 4
       frozen[I(s, c)]++                                /* 4: reads of the disk do not freeze */
#else
       skip
#endif
    :: ok && !from_disk -> treads[I(s, c)]++
    fi
  };
  if
  :: ok && from_disk -> assert(!gone[disk_of(s)]); r = src[D(disk_of(s), c)]
  :: ok && !from_disk -> assert(!freed[s]); r = tgt[I(s, c)]
  :: !ok
  fi;
  atomic {                                              /* end_read() */
    if
    :: ok && from_disk ->
#if MUT != 4
       frozen[I(s, c)]--
#else
       skip
#endif
    :: ok && !from_disk -> treads[I(s, c)]--
    :: else
    fi;
#if MUT != 12
    if :: ok -> wake(s) :: else fi;                     /* 12: a read that ends wakes nobody */
#endif
#if MUT != 3
    ok = ok && state[s] == ARMED;                       /* 3: no second look at the state */
#endif
    if :: ok -> assert(r == t0[I(s, c)]) :: else fi;    /* T0 or an error, never newer */
    r = 0; from_disk = false
  }
}

proctype reader(byte s) {
  byte c, r;
  bool ok, from_disk;
#if N == 2
  if :: c = 0 :: c = 1 fi;
#endif
  begin_request(s);
  read_run(s, c);
  end_request(s);
end: skip
}

/* snapshot_status() of one cluster: the disk is asked without freezing it, and then the maps whether it still held T0. */
proctype status(byte s) {
  byte c, r;
#if N == 2
  if :: c = 0 :: c = 1 fi;
#endif
  begin_request(s);
look:
  atomic {
    if
    :: state[s] != ARMED || !access[I(s, c)] || done[I(s, c)] -> goto out        /* an error; or the maps tell */
    :: else
    fi
  };
  r = src[D(disk_of(s), c)];                            /* blk_extent() */
  atomic {                                              /* still_t0() */
    if
    :: state[s] != ARMED -> goto out
    :: state[s] == ARMED && (done[I(s, c)] || !access[I(s, c)]) ->
#if MUT != 22
       goto look                                        /* 22: it believes what it was told */
#else
       skip
#endif
    :: else
    fi;
    assert(r == t0[I(s, c)])
  };
out:
  end_request(s);
end: skip
}

/* discard_clusters() */
inline give_up(s, c, me) {
  atomic {
    ok = state[s] == ARMED;
#if MUT != 26
    if :: ok -> access[I(s, c)] = false :: else fi      /* 26: reads are refused only at the end */
#endif
#if MUT == 14
    ; if :: ok -> need[I(s, c)] = false :: else fi      /* 14: need is cleared before those under way have ended */
#endif
  };
  do
  :: atomic {
       if
       :: ok && state[s] == ARMED &&
#if MUT == 15
          (frozen[I(s, c)] > 0 || treads[I(s, c)] > 0)  /* 15: copies are not waited for */
#elif MUT == 16
          (frozen[I(s, c)] > 0 || copying[I(s, c)])     /* 16: reads of the target are not waited for */
#else
          busy(s, c)
#endif
          -> asleep[me] = 1 + s
       :: else ->
          ok = ok && state[s] == ARMED;
          had = ok && done[I(s, c)];
          if :: ok -> need[I(s, c)] = false; done[I(s, c)] = false; wake(s) :: else fi;
          break
       fi
     };
     asleep[me] == 0
  od;
  if
  :: had -> assert(!freed[s]); tgt[I(s, c)] = 8         /* its space is given back */
  :: else
  fi
#if MUT == 26
  ; access[I(s, c)] = false
#endif
}

proctype discard(byte s; byte me) {
  byte c;
  bool ok, had;
#if N == 2
  if :: c = 0 :: c = 1 fi;
#endif
  begin_request(s);
  give_up(s, c, me);
  end_request(s);
end: skip
}

proctype job(byte s; byte me) {                         /* BackupJob._copy() */
  byte c, r;
  bool ok, from_disk, had;
  do
  :: c < N ->
     begin_request(s);
     read_run(s, c);
     end_request(s);
     if :: !ok -> break :: else fi;                     /* what was read, and is T0, is stored */
     begin_request(s);
     give_up(s, c, me);
     end_request(s);
     c++
  :: c == N -> break
  od;
end: skip
}

proctype closer() {                                     /* Disk.close(): its snapshots, then the disk */
  atomic { handle[0] = false };                         /* SnapshotCore.release() */
  atomic { state[0] = CLOSED; wake(0) };                /* disarm(): snapshot_revoke() */
#if MUT != 23
  shut(0);                                              /* 23: it is unlinked under writers in flight */
#endif
  linked[0] = false;
#if MUT != 23
  reopen(0);
#endif
#if MUT != 24
  users[0] == 0 && !copying[0] && !copying[N - 1] && !held(0, 0) && !held(0, N - 1) && treads[0] == 0 && treads[N - 1] == 0;
#endif                                                  /* snapshot_quiesce(); 24: nobody is waited for */
  freed[0] = true;                                      /* snapshot_release() */
  closed[0] = true;                                     /* disk_close() */
#if MUT != 25
  shut(0);                                              /* 25: the disk does not drain */
  reopen(0);
#endif
  gone[0] = true
}

inline run_readers() {
  atomic {
    for (k_ : 0 .. READERS - 1) {
#if ARM < NS
      run reader(ARM + k_ % (NS - ARM))
#elif NS == 1
      run reader(0)
#else
#ifdef POLICY_S
      run reader(1)                                     /* whose old data may be what was read for the other */
#else
      if :: run reader(0) :: run reader(1) fi
#endif
#endif
    };
    k_ = 0
  }
}

proctype armer() {                                      /* arm() */
  byte d;
#if defined(FREEZE) && MUT == 27
  s_records = true; b_records = false;                  /* 27: bitmaps are switched before the gate is shut */
#endif
  do
  :: d < ND ->
     shut(d);
#if MUT == 20
     reopen(d);                                         /* 20: a group drains one disk after the other, not all at once */
#endif
     d++
  :: d == ND -> break
  od;
  atomic {                                              /* T0 */
    for (k_ : ARM * N .. NS * N - 1) {
#if ND == 2
      t0[k_] = src[k_];
#else
      t0[k_] = src[k_ - ARM * N];
#endif
    }
    for (k_ : ARM .. NS - 1) { had_t0[k_] = true };
#ifdef FREEZE
    for (k_ : 0 .. N - 1) { at_t0[k_] = b_bit[k_] };
#endif
    k_ = 0
  };
#if defined(FREEZE) && MUT != 27
  s_records = true;                                     /* make_switches() */
  b_records = false;
#endif
  d = ARM;
  do
  :: d < NS ->
     atomic { linked[d] = true; state[d] = ARMED; handle[d] = true };
     d++
  :: d == NS -> break
  od;
#if MUT != 20
  d = 0;
  do
  :: d < ND -> reopen(d); d++
  :: d == ND -> break
  od;
#endif
  run_readers();
#ifdef FREEZE
  /* Freeze.commit() or merge(), when the job ends */
  for (d : 0 .. N - 1) { assert(b_bit[d] == at_t0[d]) };
  if
  :: for (d : 0 .. N - 1) { b_bit[d] = false }          /* DirtyBitmap._reset(), of a bitmap that does not record */
  :: merged = true
  fi;
#if MUT == 28
  shut(0); s_records = false; reopen(0);                /* 28: the successor stops before the bitmap records again */
#endif
  shut(0); settled = true; b_records = true; reopen(0); /* Freeze._take_over() */
  for (d : 0 .. N - 1) { if :: s_bit[d] -> b_bit[d] = true :: else fi };
  shut(0); s_records = false; reopen(0);
#endif
}

init {
  atomic {
    for (k_ : 0 .. NS * N - 1) {
      need[k_] = true;                                  /* at T0 for the whole scope; before it nobody looks */
      access[k_] = true;
      tgt[k_] = 9
    };
    for (k_ : 0 .. NS - 1) {
      if :: k_ < ARM -> state[k_] = ARMED; linked[k_] = true; handle[k_] = true; had_t0[k_] = true :: else fi
    };
    for (k_ : 0 .. WRITERS - 1) { run writer(k_, 0, k_ + 1) };
    for (k_ : 0 .. DISCARDS - 1) { run discard(0, WRITERS + k_) };
    for (k_ : 0 .. JOBS - 1) { run job(0, WRITERS + DISCARDS + k_) };
    for (k_ : 0 .. STATUS - 1) { run status(0) };
    k_ = 0;
#ifdef FREEZE
    b_records = true;
#endif
#ifdef CLOSE
    run closer();
#endif
#if ARM < NS
    run armer();
#else
    run_readers();
#endif
  };
#ifdef FREEZE
  _nr_pr == 1;                                          /* when all have ended: no write is missed */
  for (k_ : 0 .. N - 1) {
    assert(!before_t0[k_] || at_t0[k_]);
    assert(!after_t0[k_] || b_bit[k_]);
    assert(!merged || !before_t0[k_] || b_bit[k_])
  }
#endif
}
