/*
 * Does a page get lost? The guest, the hint thread, the migration and KVM's
 * dirty log, in steps as small as the real ones are. docs/proof.md explains
 * this file to readers who have never seen Promela.
 *
 * Chunks have two pages. One page, w, is watched: spin tries one of each chunk
 * in that part. The two pages of a chunk are treated alike, so what is shown for
 * w holds for all. Of the others only what can touch w is kept: that they must
 * be sent, and that they are fetched, since a CLEAR is one for a whole chunk.
 * Their bits in KVM's log are set or not, as it pleases, at every GET.
 *
 * No bytes: same says whether the destination's copy of w is what the source
 * has. A write makes it false, a copy makes it true.
 *
 * -DHINTS adds the free-page hints under two command ids (-DONE_ID: one;
 * -DEARLIER: the driver may still be answering to one before); -DIO adds devices, port accesses that wait
 * for their end, punching and holes. -DGETCLEARS is a kernel without manual
 * protection. -DNO_..., one at a time, leaves a rule out.
 */

#ifndef PAGES
#define PAGES 4
#endif
#ifndef QUEUE
#define QUEUE 3		/* length of the hint queue */
#endif

#define BIT(p) (1 << (p))
#define CHUNK(c) (3 << (2 * (c)))	/* mask of a chunk's pages */
#define ALL (BIT(PAGES) - 1)
#define W BIT(w)

byte w;			/* the watched page */

/* KVM. */
bit dirty;		/* w's bit in the log */
bit window;		/* a CLEAR took it and has not returned: a store may go unseen */

/* The tracker. Masks of pages, except writtenSince. Guarded by mutex (Tracker.mu). */
bit mutex;
byte toSend = ALL;
byte fetched;
bit writtenSince;	/* of w */
byte epoch;		/* hintEpoch.id; 0: not active */

/* What the guest may expect of w at the destination. */
bit same;		/* it holds the last write */
bit spare;		/* hinted, and not written since that id was announced; with EARLIER, since it was hinted */
#ifdef HINTS
bit since1 = 1;		/* written since id 1 was announced, or not announced yet */
bit since2 = 1;
#endif

bit running = 1;	/* vCPUs may be in the guest */

#ifdef IO
bit vmmDirty;		/* w's bit in the VMM's own bitmap */
bit hole;		/* w has no memory at the source: it reads as zero */
bit zeroThere = 1;	/* the destination's w reads as zero */
bit sent;		/* sender.sent */
bit pending;		/* a port or MMIO access that will write w when it completes */
bit busy;		/* a device has written w, or punched it out, and not marked it */
bit quiet;		/* devices start nothing new */
#endif

inline changed() {	/* there are new bytes in w */
	same = 0;
	spare = 0;
#ifdef HINTS
	since1 = 1;
	since2 = 1;
#endif
#ifdef IO
	hole = 0
#endif
}

#ifdef IO
inline complete() {	/* the next KVM_RUN stores what was read from the port */
	dirty = 1;
	changed();
	pending = 0
}
#endif

/* vCPUs: a store to w, at any time. */
active proctype vcpu() {
end:	do
	:: atomic { running ->
		if
		:: dirty = 1
		:: window	/* through an old TLB entry: KVM does not see it */
		fi;
		changed() }
#ifdef IO
	:: atomic { running && !pending -> pending = 1 }	/* KVM_RUN returns with an exit */
	:: atomic { running && pending -> complete() }
#endif
	od
}

#ifdef IO
/* The VMM's own writers: devices, and a balloon that punches. */
active proctype device() {
end:	do
	:: atomic { !quiet && !busy -> changed(); busy = 1 }	/* the bytes land */
	:: atomic { !quiet && !busy ->				/* Memory.Punch */
		changed();
		hole = 1;
		same = zeroThere;
		busy = 1 }
	:: atomic { busy ->					/* Memory.MarkDirty */
#ifdef NO_R6_MARK
		vmmDirty = vmmDirty | !hole;
#else
		vmmDirty = 1;
#endif
		busy = 0 }
	od
}
#endif

#ifdef HINTS
/* The hint queue. A START points to the driver's variable: its id is read when it is consumed. */
mtype = { START, PAGE, STOPPED };
chan queue = [QUEUE] of { mtype };

#define STOP 0		/* no id: STOP, or DONE */
#define OLD 3		/* an id of an earlier migration */

byte command = STOP;	/* what the device asks for */
byte startID;		/* the driver's variable that STARTs point to */
byte waiting;		/* an id that is announced when the queue was found empty; 0: none */
bit ended;		/* hinter.state is hintsEnded */

/* The balloon driver, as Linux has it. */
active proctype driver() {
#ifdef EARLIER
	atomic { if
	:: startID = OLD; goto endst	/* in the middle of its answer to that */
	:: true
	fi };
#endif
end:	do
	:: atomic { running && startID != command && command != STOP ->
		startID = command };
endst:	  atomic { running && nfull(queue) -> queue!START };
endpg:	  do
	  :: atomic { running && nfull(queue) ->	/* w is free */
#ifdef EARLIER
		spare = 1;
#else
		spare = spare || startID == 1 && !since1 || startID == 2 && !since2;
#endif
		queue!PAGE }
	  :: atomic { running && nfull(queue) -> queue!STOPPED; break }
	  od
	od
}

inline hint() {		/* Tracker.Hint, under mutex */
	if
#if defined(NO_R3) || defined(NO_R3_CLEAR)
	:: true ->
#elif defined(NO_R3_SINCE)
	:: epoch == answering && !(fetched & W) ->
#elif defined(NO_R3_ARM)
	:: epoch == answering && !writtenSince ->
#else
	:: epoch == answering && !writtenSince && !(fetched & W) ->
#endif
		toSend = toSend & ~W;
#ifdef NO_R3_CLEAR
		dirty = 0;
		fetched = fetched & ~W
#endif
	:: else
	fi
}

inline announce(id) {
	command = id;
	if
	:: id == 1 -> since1 = 0
	:: id == 2 -> since2 = 0
	fi
}

/* The goroutine of the hint queue: hintServer and its sink. */
active proctype hints() {
	byte answering;		/* hintServer.id */
	bit begun;		/* START with the current id has come */
	mtype m;
end:	do
	:: atomic { queue?m ->
		if
		:: m == STOPPED ->
			answering = STOP;
			ended = ended || begun;
			begun = 0;
			m = 0
		:: m == PAGE && answering == STOP -> m = 0
		:: else
		fi };
		if
		:: atomic { m == START ->	/* hintServer.command */
			m = 0;
			if
			:: startID == command -> answering = startID; begun = 1
			:: else -> answering = STOP
			fi }
		:: atomic { m == PAGE ->	/* hintServer.tell */
			m = 0;
			if
			:: command != answering
			:: else ->
endtell:			atomic { !mutex -> hint() }
			fi }
		:: m == 0
		fi
	:: atomic { waiting && empty(queue) -> announce(waiting); waiting = 0 }	/* Balloon.announceWaiting */
	od
}
#endif

/* The migration: any step that it may take, at any time, in any order. */

inline report(p) {	/* a page that is not watched: written, or not */
	if
	:: p != w -> toSend = toSend | BIT(p);
#ifndef GETCLEARS
		fetched = fetched | BIT(p)
#endif
	:: true
	fi
}

inline get(c) {		/* KVM_GET_DIRTY_LOG of a chunk, and Tracker.book */
#ifdef NO_R4
	toSend = toSend & ~CHUNK(c);
#endif
	report(2 * c);
	report(2 * c + 1);
	if
	:: dirty && (W & CHUNK(c)) ->
		toSend = toSend | W;
		writtenSince = 1;
#ifdef GETCLEARS
		dirty = 0;
		window = 1
#else
		fetched = fetched | W
#endif
	:: else
	fi
}

inline getVMM(c) {	/* Memory.FetchDirty of a chunk, and Tracker.book */
#ifdef IO
	if
	:: vmmDirty && (W & CHUNK(c)) -> vmmDirty = 0; toSend = toSend | W; writtenSince = 1
	:: else
	fi
#else
	skip
#endif
}

inline fetch(c) {	/* Tracker.fetch, under mutex */
	atomic { get(c) };
	atomic { window = 0; getVMM(c) }
}

#ifdef NO_R2
#define PASSED ALL
#else
#define PASSED fetched
#endif
inline clearBegins(c) {	/* KVM_CLEAR_DIRTY_LOG of a chunk that has fetched bits; Tracker.arm */
	if
	:: (fetched & CHUNK(c)) && dirty && (PASSED & W & CHUNK(c)) -> dirty = 0; window = 1
	:: else
	fi
}

inline clearReturns(c) {
	window = 0;
#ifndef NO_R2_TWICE
	fetched = fetched & ~CHUNK(c)
#endif
}

inline choose() {	/* a page that must be sent */
	if
	:: toSend & 1 -> p = 0
	:: toSend & 2 -> p = 1
#if PAGES > 2
	:: toSend & 4 -> p = 2
	:: toSend & 8 -> p = 3
#endif
	fi
}

inline look() {		/* RAM.Populated */
#ifdef IO
	seenHole = hole
#else
	skip
#endif
}

inline copy() {		/* sender.sendSpan, for w. What is sent lands in order. */
#ifdef IO
	if
#ifdef NO_R6
	:: seenHole
#else
	:: seenHole && !sent		/* the page is not in the message */
#endif
	:: else ->
		sent = 1;
		if
		:: seenHole ->		/* ZERO: session.applyZero */
#ifndef NO_R6_ZERO
			zeroThere = 1;
			same = hole;
#endif
			skip
		:: else -> zeroThere = hole; same = 1
		fi
	fi;
	seenHole = 0;
#else
	same = 1;
#endif
	picked = 0
}

/* Tracker.Pick. Between its steps the guest writes, and during the CLEAR hints are applied, since the mutex is free. */
inline pick() {
#ifdef NO_R1
	atomic { !mutex && toSend && !picked -> mutex = 1; choose(); picked = (p == w) };
	atomic { if :: picked -> look(); copy() :: else fi };
	atomic { clearBegins(p / 2) };
#elif defined(NO_R1_HOLE)
	atomic { !mutex && toSend && !picked -> mutex = 1; choose(); look() };
	atomic { clearBegins(p / 2) };
#else
	atomic { !mutex && toSend && !picked -> choose(); clearBegins(p / 2) };
#endif
#ifdef NO_R1_RETURN
	atomic { if :: p == w -> look(); copy() :: else fi };
#endif
	atomic {
		clearReturns(p / 2);
#if !defined(NO_R1) && !defined(NO_R1_RETURN)
		picked = (p == w && (toSend & W));	/* a hint may have taken it out */
#endif
#ifdef NO_R4_LATE
		toSend = toSend & (~BIT(p) | W);
#else
		toSend = toSend & ~BIT(p);
#endif
		p = 0;
		mutex = 0 }
}

inline read() {
#if defined(IO) && !defined(NO_R1_HOLE)
	look();
#endif
	atomic { copy();
#ifdef NO_R4_LATE
		late = 1
#endif
	}
}

#ifdef NO_R3_DANCE	/* the wait for the driver's own STOP */
#define ANSWERED true
#else
#define ANSWERED ended
#endif

inline beginHintEpoch(id) {
	atomic { !mutex -> mutex = 1; epoch = 0;
#ifdef NO_R3
		};
#else
		get(0) };
	atomic { window = 0; getVMM(0) };
#ifndef NO_R3_ARM
	atomic { clearBegins(0) };
	atomic { clearReturns(0) };
#endif
#if PAGES > 2
	fetch(1);
#ifndef NO_R3_ARM
	atomic { clearBegins(1) };
	atomic { clearReturns(1) };
#endif
#endif
#endif
	atomic { writtenSince = 0; epoch = id; mutex = 0 }
}

#ifdef HINTS
inline ask(id) {	/* hinter.ask */
	beginHintEpoch(id);
	atomic {	/* Balloon.AnnounceHints */
		asked = id;
		ended = 0;
#ifdef NO_R3_DRAIN
		announce(id)
#else
		waiting = id
#endif
	}
}
#endif

active proctype migration() {
	byte p;
#ifdef HINTS
	byte asked;		/* the last id */
#endif
	bit picked;		/* w was picked, and is not read yet */
#ifdef IO
	bit seenHole;
#endif
#ifdef NO_R4_LATE
	bit late;
#endif
	atomic {		/* which page is watched, and what there is when tracking starts */
		if
		:: w = 0
#if PAGES > 2
		:: w = 2
#endif
		fi;
#ifndef GETCLEARS
		if
		:: dirty = 1; fetched = ALL	/* KVM_DIRTY_LOG_INITIALLY_SET, and Tracker.Start */
		:: skip
		fi;
#endif
#ifdef IO
		if
		:: hole = 1; same = 1
		:: skip
		fi;
#endif
	}

precopy:
	do
	:: atomic { !mutex -> mutex = 1; get(0) };	/* Tracker.SyncSlot */
	   atomic { window = 0; getVMM(0); mutex = 0 }
#if PAGES > 2
	:: atomic { !mutex -> mutex = 1; get(1) };
	   atomic { window = 0; getVMM(1); mutex = 0 }
#endif
	:: pick()
	:: picked -> read()
#ifdef NO_R4_LATE
	:: atomic { late -> toSend = toSend & ~W; late = 0 }
#endif
#ifdef HINTS
	:: atomic { asked -> command = STOP; waiting = 0 }	/* Balloon.StopHints */
	:: asked == 0 -> ask(1)
#ifndef ONE_ID
	:: asked == 1 && ANSWERED -> ask(2)
#endif
#endif
	:: !picked -> break
	od;

	/* R5: precopy.switchover. */
	running = 0;			/* gate.hold: all vCPUs are out */
#ifdef IO
#ifndef NO_R5
	atomic { if
	:: pending -> complete()	/* gate.admit: in again, with immediate_exit */
	:: else
	fi };
#endif
	quiet = 1;
#ifndef NO_R5_DRAIN
	!busy;
#endif
#endif
#ifndef NO_R5_SYNC
	atomic { !mutex -> mutex = 1; get(0) };
	atomic { window = 0; getVMM(0) };
#if PAGES > 2
	fetch(1);
#endif
	mutex = 0;
#endif
#if defined(IO) && defined(NO_R5)
	atomic { if
	:: pending -> complete()
	:: else
	fi };
#endif
#if defined(IO) && defined(NO_R5_DRAIN)
	!busy;
#endif
	do
	:: pick()
	:: picked -> read()
#ifdef NO_R4_LATE
	:: atomic { late -> toSend = toSend & ~W; late = 0 }
#endif
	/* More was left than the estimate said, or the stop takes too long: on with precopy,
	   at any moment before COMMIT, also while a page that was picked is not sent yet. */
	:: atomic { running = 1;
#ifdef IO
		quiet = 0;
#endif
		goto precopy }
	:: !toSend && !picked -> break
	od;
	assert(same || spare)		/* the page is not lost */
}
