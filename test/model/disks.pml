/*
 * Does a block of a disk that moves along get lost? The device, the passes of the
 * migration, two channels whose frames overtake each other, and a stop that may be
 * undone. docs/proof.md explains the file.
 *
 * One block is watched: blocks share nothing but the log, whose bits are their own. Its
 * content is the number of the request that wrote it last; 0 is a hole. The device
 * carries out requests in three steps: the bytes land, the record has the block, the
 * guest is told. -DNO_..., -DEARLY_..., one at a time, break a rule.
 */

#define REQUESTS 3
#define STOPS 2		/* the last one is not undone */

byte src;		/* content at the source */
byte dst;		/* and at the destination, whose file is new */
bit recorded;		/* the block's bit in the record (blk.Device.blockLog) */
bit toSend = 1;		/* tracker.toSend */
bit sent;		/* diskCopy.sent */

bit paused;		/* the device takes no request */
bit busy;		/* a request is under way */
bit over;		/* the guest is at the destination, or the model has ended */

chan one = [2] of { byte };
chan two = [2] of { byte };

active proctype device() {
	byte n = 0;
	do
	:: atomic { n < REQUESTS && !paused && !over -> busy = 1; n++ };
#ifdef EARLY_RECORD
	   recorded = 1;
#endif
	   if
	   :: src = n
	   :: src = 0	/* a discard, or zeros */
	   fi;
#ifdef EARLY_TOLD
	   busy = 0;	/* the guest is told, and a pause does not wait */
#endif
#ifndef EARLY_RECORD
#ifndef NO_RECORD_OF_ZERO
	   recorded = 1;
#else
	   if
	   :: src != 0 -> recorded = 1
	   :: else
	   fi;
#endif
#endif
	   busy = 0
	:: atomic { n == REQUESTS || over -> break }
	od
}

/* The destination's channels: frames of one land in order. */
active proctype landsOne() {
	byte v;
end:	do
	:: atomic { one?v -> dst = v }
	od
}

active proctype landsTwo() {
	byte v;
end:	do
	:: atomic { two?v -> dst = v }
	od
}

#define landed (empty(one) && empty(two))

inline fetch() {
	atomic {
		if
		:: recorded -> recorded = 0; toSend = 1
		:: else
#ifdef NO_R4
		   -> toSend = 0
#endif
		fi
	}
}

inline put(v) {
	if
	:: one!v
	:: two!v
	fi
}

/* A pass may be halted before it has picked the block. */
inline pass(mayHalt) {
	if
	:: mayHalt
	:: toSend ->
#ifdef NO_R1
	   read = src;
	   recorded = 0;	/* the record is cleared after the block was read */
	   toSend = 0;
#else
	   toSend = 0;
	   read = src;
#endif
	   if
#ifdef NO_R6
	   :: read == 0
#else
	   :: read == 0 && !sent
#endif
	   :: else ->
#ifndef NO_R6_MARK
	      sent = 1;
#endif
	      put(read)
	   fi
	:: !toSend
	fi;
	read = 0
}

inline barrier() {
#ifndef NO_BARRIER
	landed
#else
	skip
#endif
}

active proctype migration() {
	byte read, stops = 0;
	bit halted;
	fetch(); pass(0); barrier();		/* the first pass */
	fetch(); pass(0); barrier();		/* a round */
	do
	:: stops++;
#ifdef NO_R5_SYNC
	   fetch();
#endif
	   paused = 1;
#ifndef NO_R5
	   !busy;				/* virtio.Loop.Pause */
#endif
#ifndef NO_R5_SYNC
	   fetch();
#endif
	   if
	   :: stops < STOPS -> halted = 1	/* the guest runs on at any moment from here */
	   :: else -> halted = 0
	   fi;
	   if
	   :: halted -> paused = 0
	   :: !halted
	   fi;
	   pass(halted);
	   if
	   :: halted -> barrier(); fetch(); pass(0); barrier()
	   :: else -> break
	   fi
	od;
	landed;
	over = 1;
	assert(dst == src)
}
