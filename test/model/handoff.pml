/*
 * Who may run the guest? The source, the destination and a network that loses
 * messages, while either side may crash, time out or be cancelled at any step.
 * docs/proof.md explains this file to readers who have never seen Promela.
 *
 * Two migrations are tried one after the other, so that what is left on the
 * wire of the first can meet the second. Messages of one connection arrive in
 * order or not at all; a query is a connection of its own.
 *
 * After calm nothing is lost any more and nobody crashes, and a time-out comes
 * only when nothing else can happen: then somebody must get to run.
 *
 * -DPOSTCOPY: the guest moves before all of its memory has, and lacks it until the
 * source has sent it, by connections that may be lost.
 *
 * -DNO_..., one at a time, leaves a rule out.
 */

#ifndef ONCE
#define ONCE 2		/* migrations */
#endif
#ifndef STOPS
#define STOPS 1		/* in each; all but the last may be undone */
#endif

mtype = { STATE, COMMIT, ABORT, UNDO, PREPARED, RUNNING, FAILED, UNKNOWN, ABORTED };

/* A session's connection, and the queries. The numbers are the session's nonce, and that of
   the source's stop. */
chan toDst = [2] of { mtype, byte, byte };
chan toSrc = [2] of { mtype, byte, byte };
chan query = [2] of { byte };
chan verdict = [1] of { mtype, byte };

bit calm;		/* the network and the machines are well from here on */
bit dstRestarted;	/* the destination crashed, and listens again, without memory */

bit srcRuns = 1;
bit dstRuns;
#ifdef POSTCOPY
bit lacks;		/* it lacks memory that is at the source */
chan rest = [1] of { byte };	/* the rest of it, of a session */
chan whole = [1] of { byte };	/* it has arrived */
#else
#define lacks false
#endif
bit dstRan;		/* the guest has run at the destination, whatever became of it */
byte session;		/* the source's */
byte stop;		/* the source's, in this session */
byte loaded;		/* the stop whose state the destination has */
bit committed;		/* Migration.committed */
bit cancelled;

/* The destination, of each session. */
#define NONE 0
#define RECEIVING 1
#define READY 2
#define RUNS 3
#define GAVEUP 4
byte state[3];

inline srcResumes() {
	assert(!dstRan);		/* never two, and never back to an old copy */
	srcRuns = 1
}

inline dstStarts(s) {
	assert(!srcRuns);		/* never two */
	assert(loaded == stop);		/* never from the state of a stop that was undone */
	state[s] = RUNS;
	dstRuns = 1;
#ifdef POSTCOPY
	lacks = 1;
#endif
	dstRan = 1
}

/* session.commit: one step, under verdictMu. */
inline commit(s) {
	if
	:: dstStarts(s)
	:: state[s] = GAVEUP		/* Target.Start failed */
	fi
}

#define SILENCE (!calm || timeout)

active proctype source() {
	mtype m;
	byte s, n;

precopy:
	if
	:: atomic { session < ONCE -> session++; stop = 0; committed = 0; cancelled = 0; s = 0 }
	:: goto endRunning		/* it has had enough */
	fi;
	/* Before the stop nothing can go wrong: it runs. */
halt:
	atomic { srcRuns = 0; stop++ };	/* Source.PauseForHandoff */
	if
	:: toDst!STATE(session, stop)
	:: !calm			/* lost */
	fi;
	do				/* link.await(PREPARED) */
	:: atomic { toSrc?m,s,n ->
		if
#ifdef NO_STOP_NUMBER
		:: s == session && m == PREPARED -> goto prepared
#else
		:: s == session && m == PREPARED && n == stop -> goto prepared
#endif
		:: s == session && m == FAILED -> goto back
		:: else			/* of a connection that is closed */
		fi }
	:: stop < STOPS -> goto undo	/* the stop takes too long */
	:: SILENCE -> goto back		/* lost, or PeerTimeout */
	:: cancelled -> goto back
	od;

undo:					/* precopy.halt, precopy.forget */
	atomic { srcResumes() };
	if
	:: toDst!UNDO(session, stop)
	:: !calm
	:: cancelled -> goto back
	fi;
	if
	:: cancelled -> goto back
	:: SILENCE -> goto back
	:: goto halt			/* precopy goes on, and stops the guest again */
	fi;

prepared:				/* Migration.commit: under handoffMu, as Cancel is */
#ifdef NO_EXCLUSION
	if
	:: cancelled -> goto back
	:: else
	fi;
	committed = 1;
#else
	atomic { if
	:: cancelled -> goto back
	:: else -> committed = 1
	fi };
#endif
#ifdef NO_STOP
	srcResumes();
#endif
	if				/* Migration.sendCommit */
	:: toDst!COMMIT(session, stop)
	:: !calm
	fi;
	do
	:: atomic { toSrc?m,s,n ->
		if
		:: s == session && m == RUNNING -> goto endGone
		:: s == session && m == FAILED -> goto back
		:: else
		fi }
#ifdef NO_EXCLUSION
	:: cancelled -> goto back
#endif
#ifdef NO_WAIT
	:: SILENCE -> goto back
#else
	:: SILENCE -> break
#endif
	od;
#ifdef NO_ASKING
	goto endStuck;
#endif

ask:					/* Migration.askUntilKnown */
	if
	:: query!session
	:: !calm
	fi;
	do
	:: atomic { verdict?m,s ->
		if
		:: s == session && m == RUNNING -> goto endGone
		:: s == session && m == ABORTED -> goto back
#ifdef NO_UNKNOWN
		:: s == session && m == UNKNOWN -> goto back
#else
		:: s == session && m == UNKNOWN -> goto again
#endif
		:: else
		fi }
	:: SILENCE -> goto ask
#ifdef FORCE
	:: true -> goto back		/* govmm resume --force */
#endif
	od;
again:
	if
	:: dstRestarted && calm -> goto endStuck	/* it would ask for ever; a human must look */
	:: else -> goto ask
	fi;

back:					/* Migration.takeBack */
	atomic { srcResumes() };
	if				/* link.end */
	:: !committed && nfull(toDst) -> toDst!ABORT(session, 0)
	:: true				/* lost */
	fi;
	goto precopy;
endRunning:
	false;
endGone:
#ifdef POSTCOPY
	do				/* Migration.serve */
	:: if
	   :: nfull(rest) -> rest!session
	   :: !calm			/* lost */
	   fi;
	   if
	   :: atomic { whole?s -> goto endServed }
#ifdef NO_RECOVERY
	   :: SILENCE -> goto endStuck
#else
	   :: SILENCE			/* the connection is lost: another one */
#endif
	   :: dstRestarted && calm -> goto endStuck	/* the destination has died: nothing can be done */
#ifdef NO_REFUSAL
	   :: true -> goto back		/* govmm resume --force, or a cancel */
#endif
	   fi
	od;
endServed:
#endif
	false;
endStuck:
	false
}

/* The destination's connection goroutine: Receiver.takeMigration. */

#define HERE (state[cur] != NONE)	/* it has not crashed */

inline tell(m) {	/* to the source; it may have closed, or die */
	if
	:: atomic { HERE && nfull(toSrc) -> toSrc!m(cur, loaded) }
	:: !calm
	:: full(toSrc)
	:: !HERE
	fi
}

inline giveUp() {	/* session.finish: unless it runs */
	if
	:: state[cur] == READY -> state[cur] = GAVEUP
	:: else
	fi
}

active proctype destination() {
	mtype m;
	byte s, n, cur;

endIdle:
	atomic { toDst?m,s,n ->
		if
		:: m == STATE && state[s] == NONE -> cur = s; state[cur] = RECEIVING; loaded = n; n = 0
		:: else -> s = 0; n = 0; goto endIdle	/* of a connection that is closed */
		fi };
loads:
	atomic { if			/* Target.LoadState */
	:: HERE -> state[cur] = READY	/* session.prepared */
	:: HERE -> state[cur] = GAVEUP; goto failed
	:: !HERE -> goto endIdle
	fi };
#ifdef NO_VERDICT_FIRST
	dstRuns = 1; dstRan = 1;	/* vCPUs run, and the verdict follows */
	assert(!srcRuns);
#endif
	tell(PREPARED);
	do
	:: atomic { toDst?m,s,n ->
		if
		:: s == cur && m == COMMIT ->
			if
			:: state[cur] == READY && n == loaded -> commit(cur); break
			:: else -> giveUp(); break
			fi
		:: s == cur && m == UNDO && n == loaded && state[cur] == READY ->	/* session.undo */
			state[cur] = RECEIVING; n = 0; goto again
		:: s == cur && m == STATE -> giveUp(); break	/* UNDO was lost, so the connection is */
		:: s == cur && m == ABORT -> giveUp(); break
		:: else
		fi }
#ifndef NO_PATIENCE_LIMIT
	:: atomic { SILENCE ->
#ifdef NO_FINAL
		goto tooEarly }
#else
		giveUp(); break }
#endif
#endif
	:: state[cur] != READY -> break	/* a query came first, or a crash */
	od;
#ifdef NO_IRREVERSIBLE
	if
	:: atomic { toDst?m,s,n ->
		if
		:: s == cur && m == COMMIT && state[cur] == GAVEUP -> commit(cur)
		:: else
		fi }
	:: true
	fi;
#endif
	if
	:: state[cur] == RUNS -> tell(RUNNING); goto taken
	:: state[cur] == GAVEUP -> goto failed
	:: state[cur] == NONE -> goto endIdle
	fi;
	goto told;
again:					/* session.receiveState, after UNDO */
	do
	:: atomic { toDst?m,s,n ->
		if
		:: s == cur && m == STATE && HERE -> loaded = n; n = 0; goto loads
		:: s == cur && HERE -> state[cur] = GAVEUP; goto failed
		:: else
		fi }
	:: atomic { SILENCE && HERE -> state[cur] = GAVEUP; goto failed }
	:: !HERE -> goto endIdle
	od;
told:
#ifdef NO_FINAL
	false;
tooEarly:
	tell(FAILED);
	giveUp();
	if
	:: state[cur] == RUNS -> goto taken
	:: else -> goto endIdle
	fi;
#endif
failed:	tell(FAILED);			/* session.tellFailure */
#ifdef NO_MEMORY
	atomic { if
	:: state[cur] == GAVEUP -> state[cur] = NONE
	:: else
	fi };
#endif
	goto endIdle;
taken:					/* no further migration; what comes is refused */
endTaken: do
	:: atomic { state[cur] == RUNS && nempty(toDst) -> toDst?m,s,n; s = 0; n = 0 }
	:: state[cur] == NONE -> goto endIdle
	od
}

/* Queries: Receiver.answer and session.queried. */
active proctype answers() {
	mtype m;
	byte s;
end:	do
	:: atomic { query?s ->
#ifdef NO_NONCE
		s = (state[2] != NONE -> 2 : s);
#endif
		if
#ifndef NO_PATIENCE_LIMIT
		:: state[s] == READY -> commit(s)
#endif
		:: else
		fi;
		if
		:: state[s] == RUNS -> m = RUNNING
		:: state[s] == GAVEUP -> m = ABORTED
		:: else -> m = UNKNOWN
		fi };
		if
		:: verdict!m,s
		:: !calm
		:: full(verdict)
		fi;
		s = 0
	od
}

#ifdef POSTCOPY
/* The destination's intake: it outlives the session. */
active proctype intake() {
	byte s;
end:	do
	:: atomic { rest?s ->
		if
		:: state[s] == RUNS -> lacks = 0
		:: else -> s = 0; goto end
		fi };
		if
		:: atomic { nfull(whole) -> whole!s }
		:: !calm		/* lost */
		:: full(whole)
		fi;
		s = 0
	od
}
#endif

/* The user. */
active proctype user() {
end:	do
	:: atomic { !calm &&
#ifndef NO_EXCLUSION
	   !committed &&
#endif
	   !cancelled && session > 0 -> cancelled = 1 }	/* Migration.Cancel */
	od
}

#ifdef LIVE
/* Never none able to run while both are alive and connected. */
ltl able { [] (calm -> <> (srcRuns || dstRuns && !lacks || (dstRestarted && committed))) }
#endif

/* The network, and what befalls the machines. */
active proctype world() {
	mtype m;
	byte s, n;
end:	do
	:: atomic { !calm && nempty(toDst) -> toDst?m,s,n; s = 0; n = 0 }
	:: atomic { !calm && nempty(toSrc) -> toSrc?m,s,n; s = 0; n = 0 }
	:: atomic { !calm && nempty(query) -> query?s; s = 0 }
	:: atomic { !calm && nempty(verdict) -> verdict?m,s; s = 0 }
#ifdef POSTCOPY
	:: atomic { !calm && nempty(rest) -> rest?s; s = 0 }
	:: atomic { !calm && nempty(whole) -> whole?s; s = 0 }
#endif
	:: !calm -> calm = 1
	:: atomic { !calm && !dstRestarted ->		/* the destination crashes */
		dstRestarted = 1;
		dstRuns = 0;
		state[1] = NONE;
		state[2] = NONE;
		do			/* its connections end */
		:: toDst?m,s,n
		:: empty(toDst) -> break
		od }
	od
}
