/*
 * Memory that comes later: does a page get lost, overwritten, or never come? One
 * page is watched: pages do not touch each other here. docs/proof.md explains
 * this file to readers who have never seen Promela.
 *
 * The guest runs at the source and writes the page, stops, may go on (the stop is
 * undone), stops again, and moves. At the destination a vCPU, a device (Go code of
 * the VMM) and the balloon use the page while it is announced, asked for, sent on
 * request and in its turn, lost on the way and sent again.
 *
 * Content is a number: that of the last write. there is what the destination has,
 * truth what the guest must find. -DHINTED: the guest hinted the page, and has not
 * written it since. -DUNDO: a stop may be undone; -DLOSS: a set of connections is
 * lost; -DGC: the collector runs. -DHUGE: the page is one of a huge page, whose file
 * keeps what it had; exists says whether the guest's page table has it.
 * -DNO_..., one at a time, leaves a rule out.
 */

#define ZERO 15

mtype = { LIST, PAGE };

/* Connections of a set: what is asked on, and the other one. */
chan urgent = [3] of { mtype, byte, byte };	/* LIST: missing, number of the stop. PAGE: content */
chan bulk = [1] of { byte };
chan want = [1] of { bit };
chan lacks = [1] of { bit };	/* what the destination says that it lacks, in a new set */

/* The source. */
byte src = 1;		/* its content */
byte truth = 1;
bit toSend = 1;		/* tracker.toSend */
byte stop;
#ifdef UNDO
bit undone;		/* a stop has been */
#else
bit undone = 1;
#endif
bit srcRuns = 1;
bit armed;		/* serving.armed */
bit committed;
bit left;		/* serving.left */
bit answering;		/* outSet.answering */

/* The control connection, in order: what the destination is told of a stop. */
bit stateSent;		/* STATE of stop, not undone */
bit prepared;

/* The destination. */
byte listed;		/* the stop of the last list that is whole */
bit list;		/* it names the page */
byte armedFor;		/* the stop whose pages are missing; 0: none */
bit absent;		/* Missing.absent */
bit claimed;
bit exists;		/* the page table has it */
byte there;		/* its content, if it exists; otherwise it reads as ZERO once it is made */
bit asked;
bit dstRuns;
bit given;		/* the balloon is giving it up: the guest does not use it */
bit landing;		/* pages that are between two steps */
#ifdef LOSS
bit lost;		/* a set has been lost */
#else
bit lost = 1;
#endif
bit breaking;		/* and the next one is not there yet */

/* Go's runtime at the destination. */
bit faulting;		/* a goroutine's thread stands in a fault, and does not stop for the collector */
bit collecting;		/* no goroutine runs */
#ifdef GC
bit collected;
#else
bit collected = 1;
#endif

#define GO (!collecting)

/* The guest at the source. */
active proctype guestThere() {
end:	do
	:: atomic { srcRuns && truth < 4 ->
		truth++;
		src = truth;
		toSend = 1 }
	:: atomic { srcRuns && toSend && stop == 0 && !armed ->	/* a round sends it */
		toSend = 0;
		there = src;
		exists = 1 }
	od
}

active proctype source() {
	atomic { srcRuns = 0; stop = 1 };
again:
#ifdef HINTED
	atomic { toSend = 0 };			/* R3: a hint took it out, and it was not written */
#endif
	/* serving.announce: under answering */
	atomic { !answering -> answering = 1 };
	urgent!LIST(toSend, stop);
	atomic { left = toSend; armed = 1; answering = 0 };
	stateSent = 1;
	if
	:: prepared
	:: atomic { !undone -> undone = 1 };
		atomic {			/* precopy.halt: disarm, then the guest goes on */
			armed = 0;
#ifdef NO_R7
			toSend = left;
#endif
			stateSent = 0; prepared = 0; srcRuns = 1 };
		atomic { srcRuns = 0; stop = 2 };
		goto again
	fi;
	atomic { committed = 1; dstRuns = 1 }	/* COMMIT; handoff.pml has what may go wrong */
}

/* No page that was looked at before a list is written after it. */
#ifdef NO_R7_BARRIER
#define FREE true
#define HOLD skip
#define RELEASE skip
#else
#define FREE !answering
#define HOLD answering = 1
#define RELEASE answering = 0
#endif

/* outSet.read and answer. */
active proctype answers() {
	byte content;
end:	do
	:: atomic { want?_ ->
		if
		:: armed && !breaking && FREE -> HOLD
		:: else -> goto end
		fi;
		content = src;
#ifdef NO_R7
		left = 0
#else
		if
		:: committed -> left = 0
		:: else
		fi
#endif
		};
		if
		:: atomic { nfull(urgent) && !breaking -> urgent!PAGE(content, 0) }
		:: breaking
		fi;
		atomic { content = 0; RELEASE }
	od
}

/* outSet.pour. */
active proctype pour() {
	byte content;
end:	do
	:: atomic { committed && left && !breaking -> left = 0; content = src };
		if
		:: atomic { nfull(bulk) && !breaking -> bulk!content }
		:: breaking
		fi;
		content = 0
	od
}

/* The network loses a set once; the source makes another (Migration.again). */
active proctype sets() {
	bit b;
end:	do
	:: atomic { committed && !lost && absent -> lost = 1; breaking = 1;
		do
		:: urgent?_,_,_
		:: bulk?_
		:: want?_
		:: empty(urgent) && empty(bulk) && empty(want) -> break
		od };
		(!landing);			/* R9: what was read has landed, or is thrown away */
		atomic { GO -> lacks!absent; asked = 0 };
		atomic { lacks?b;
#ifndef NO_R9
			left = b;
#endif
			b = 0; breaking = 0 }
	od
}

/* Missing.Land, step by step. The first step decides who brings the page. */
#ifdef HUGE
#define MAKE(content) there = content		/* by the second mapping */
#define SHOW ; atomic { GO -> exists = 1 }	/* UFFDIO_CONTINUE, when no other page of it is missing */
#define FILL exists = 1				/* the same, by who faults */
#define GIVEUP if :: absent -> there = ZERO; exists = 1 :: else fi;	/* zeroHuge, closeHuge */
#else
#define MAKE(content) \
	if \
	:: !exists -> exists = 1; there = content	/* UFFDIO_COPY does it */ \
	:: else \
	fi
#define SHOW
#define FILL if :: !exists -> exists = 1; there = ZERO :: else fi	/* UFFDIO_ZEROPAGE */
#define GIVEUP
#endif

inline land(content) {
	landing = 1;
	if
	:: atomic { GO && armedFor == 0 }	/* of a stop that was undone */
#if defined(NO_R8_CLAIM)
	:: atomic { GO && armedFor != 0 && absent };
		atomic { MAKE(content); absent = 0 }
		SHOW
	:: atomic { GO && armedFor != 0 && !absent }
#elif defined(NO_R8)
	:: atomic { GO && armedFor != 0 };
		atomic { exists = 1; there = content; absent = 0 }
#else
	:: atomic { GO && armedFor != 0 && absent && !claimed -> claimed = 1 };
		atomic { GO -> MAKE(content) };
		atomic { GO -> absent = 0 }
		SHOW
	:: atomic { GO && armedFor != 0 && (!absent || claimed) }
#endif
	fi;
	atomic { landing = 0; content = 0 }
}

active proctype readUrgent() {
	byte content, s;
end:	do
	:: atomic { GO && urgent?[LIST, content, s] -> urgent?LIST,content,s;
		list = content; listed = s; content = 0; s = 0 }
	:: atomic { GO && urgent?[PAGE, content, s] -> urgent?PAGE,content,s };
		land(content)
	od
}

active proctype readBulk() {
	byte content;
end:	do
	:: atomic { GO && nempty(bulk) -> bulk?content };
		land(content)
	od
}

#define UNDONE (!stateSent || armedFor != stop)

/* session.loadState and undo. */
active proctype destination() {
end:	do
	:: atomic { GO && stateSent && listed == stop && armedFor == 0 && !landing ->
		/* Missing of the stop before has been stopped */
		armedFor = stop; absent = list; claimed = 0; asked = 0;
#ifndef NO_R8_HIDDEN
		if
		:: list -> exists = 0
		:: else
		fi
#endif
		};
		if
		:: absent ->			/* LoadState touches the page */
			do
			:: atomic { GO && !asked && nfull(want) -> want!1; asked = 1 }
			:: atomic { !absent -> break }
#ifndef NO_R7_UNDO
			:: UNDONE -> break	/* session.loadState takes UNDO meanwhile */
#endif
			od
		:: true				/* or it does not, or the page is there */
		fi;
		atomic { if
#ifdef HUGE
		:: UNDONE && !landing -> GIVEUP armedFor = 0; absent = 0; asked = 0	/* Missing.Stop waits */
		:: !UNDONE -> prepared = 1
#else
		:: UNDONE -> armedFor = 0; absent = 0; asked = 0	/* intake.disarm */
		:: else -> prepared = 1
#endif
		fi }
	:: atomic { armedFor != 0 && UNDONE && !landing -> GIVEUP armedFor = 0; absent = 0; asked = 0 }
	od
}

inline use() {		/* reads, and writes */
#ifndef HINTED
	assert(there == truth);
#endif
	there = 8; truth = 8
}

/* A vCPU: it waits in the kernel if the page does not exist. */
active proctype vcpu() {
	byte n;
	if
	:: n = 2		/* it never uses the page */
	:: true
	fi;
end:	do
	:: atomic { dstRuns && !given && exists && n < 2 -> n++; use() }
	:: atomic { dstRuns && !given && !exists && n < 2 && GO ->
		if
		:: absent && !asked && !breaking && nfull(want) -> want!1; asked = 1
		:: !absent -> FILL
		fi }
	od
}

/* A device: a goroutine of the VMM. */
active proctype device() {
	bit done;
	if
	:: done = 1
	:: true
	fi;
end:	do
#ifdef NO_R10
	:: atomic { dstRuns && !given && GO && !done && !exists -> faulting = 1 };
		atomic { exists -> faulting = 0 };
#else
	:: atomic { dstRuns && !given && GO && !done ->
		if
		:: absent && !asked && !breaking && nfull(want) -> want!1; asked = 1
		:: !absent || asked || breaking || full(want)
		fi };
		atomic { !absent && GO -> FILL };	/* MADV_POPULATE_WRITE */
#endif
		atomic { GO -> if
		:: !given && exists -> use(); done = 1
		:: given || !exists
		fi }
	od
}

/* The guest's balloon: Memory.Punch. */
active proctype balloon() {
	if
	:: atomic { dstRuns && GO -> given = 1 };
#ifdef NO_R8_CLAIM
		atomic { GO -> absent = 0 };
		atomic { GO -> exists = 0 };
#else
		if
		:: atomic { GO && absent && !claimed -> claimed = 1 };
#ifdef HUGE
			atomic { GO -> there = ZERO };
#endif
			atomic { GO -> absent = 0 }
			SHOW
		:: atomic { GO && !absent ->
#ifdef HUGE
			there = ZERO
#else
			if
			:: exists -> there = ZERO
			:: else
			fi
#endif
			}
		fi;
#endif
		atomic { truth = ZERO; given = 0 }
	:: true
	fi
}

/* The collector: it stops all goroutines, once. */
active proctype collector() {
	if
	:: atomic { dstRuns && !collected -> collecting = 1; collected = 1 };
		(!faulting);
		collecting = 0
	:: true
	fi
}

/* When nothing else can happen, all of the guest's memory is there. */
active proctype end_() {
	timeout -> assert(committed && !absent && !collecting && !breaking)
}
