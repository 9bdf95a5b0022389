/* The per-cluster protocol of src/cbwcore/_preserve.pxd and _snapshot.pxd (DESIGN R1-R3, R6-R9): two writers, two readers, two clusters,
 * copies that fail or outlive their timeout, both policies.
 *
 *   spin -a [-DPOLICY_S] [-DMUT=n] cbw.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m200000
 *
 * -DPOLICY_S is break-snapshot, else break-guest-write. Without MUT spin finds no violation and no deadlock; each MUT takes
 * one ordering away, and spin finds a snapshot read that returns newer data (tests/model/test_spin.py runs them all).
 *
 * It differs from the first model in one point: after a break a writer waits for nobody, and instead a reader that read
 * the disk looks at the state once more in the critical section in which it unfreezes (end_read).
 */
#define N 2                             /* clusters */
#ifndef MUT
#define MUT 0
#endif
byte src[N], tgt[N];                    /* 0 = T0 data */
bool need[N], done[N], copying[N];
byte frozen[N];                         /* snapshot reads of the disk under way */
bool broken;

proctype copier(byte c) {               /* copy_main: may outlive its writer's patience */
  byte b;
  b = src[c];
  if
  :: tgt[c] = b;
     atomic {
       copying[c] = false;
       if
       :: !broken -> done[c] = true                     /* R8; a late copy counts no more after the break */
       :: else
       fi
     }
  :: atomic {                                           /* the copy fails */
       copying[c] = false;
#ifdef POLICY_S
       broken = true                                    /* snapshot_break */
#endif
     }
  fi
}

proctype writer(byte v) {
  byte c; bool mine = false;
  if :: c = 0 :: c = 1 fi;
  if :: !need[c] || broken -> goto io :: else fi;       /* snapshot_needs: the fast path */
slow:                                                   /* preserve_run, under the lock */
  atomic {
    if
    :: broken || !need[c] -> goto io
    :: else
    fi;
#if MUT == 2
    if :: done[c] -> need[c] = false; goto io :: else fi;               /* 2: no wait for frozen reads */
#endif
    if
    :: done[c] && frozen[c] == 0 -> need[c] = false; goto io
    :: done[c] && frozen[c] > 0 -> goto wait
    :: !done[c] && copying[c] -> goto wait
    :: !done[c] && !copying[c] && mine -> goto failed   /* its own copy failed */
    :: !done[c] && !copying[c] && !mine ->
#if MUT == 1
         need[c] = false;                               /* 1: need cleared before the target holds the data */
#endif
         copying[c] = true; mine = true; run copier(c); goto wait
    fi
  }
wait:                                                   /* cond_wait, or the timeout */
  if
  :: atomic { broken || (!copying[c] && !(done[c] && frozen[c] > 0)) -> goto slow }
#if MUT == 1
  :: atomic { !need[c] -> goto slow }
#endif
  :: goto timeout_
  fi;
timeout_:
#ifdef POLICY_S
  broken = true;
  goto io;
#endif
failed:
#ifdef POLICY_S
  goto slow;
#else
  goto end;                                             /* refused: this writer has not changed the disk */
#endif
io:
  src[c] = v;
end: skip
}

proctype reader() {
  byte c, r; bool from_disk;
  if :: c = 0 :: c = 1 fi;
  atomic {                                              /* read_run, under the lock */
    if
    :: broken -> goto end
    :: !broken && done[c] -> from_disk = false
    :: !broken && !done[c] -> from_disk = true;
#if MUT != 4
         frozen[c]++                                    /* 4: reads do not freeze */
#endif
    fi
  };
  if
  :: from_disk -> r = src[c]
  :: else -> r = tgt[c]
  fi;
  atomic {                                              /* end_read, under the lock */
#if MUT != 4
    if :: from_disk -> frozen[c]-- :: else fi;
#endif
#if MUT != 3
    if :: broken -> goto end :: else fi                 /* 3: no second look at the state */
#endif
  };
  assert(r == 0);                                       /* T0 or an error, never newer */
end: skip
}

init {
  atomic {
    byte i = 0;
    do :: i < N -> need[i] = true; tgt[i] = 9; i++ :: else -> break od;
    run writer(1); run writer(2); run reader(); run reader();
  }
}
