package virtio

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"
)

var (
	// ErrRing is wrapped by the error of a queue whose driver broke a rule of
	// the rings. The queue returns no more chains until the driver resets it.
	ErrRing = errors.New("the driver broke the virtqueue")
	// ErrNotOut: the chain that is given back is not out, or not the last one.
	ErrNotOut = errors.New("the chain is not out")
	// ErrInFlight: a queue's state cannot be saved while chains are out.
	ErrInFlight = errors.New("requests are in flight")
)

// QueueState is a queue as the driver set it up, and its position: what travels
// with a migration. When a queue is enabled, all that follows Device is zero.
type QueueState struct {
	Size    uint16 `cbor:"size"` // descriptors
	Enabled bool   `cbor:"enabled"`
	Desc    uint64 `cbor:"desc"`   // gpa of the descriptor table, or of the packed ring
	Driver  uint64 `cbor:"driver"` // gpa of the available ring, or of the driver's event suppression
	Device  uint64 `cbor:"device"` // gpa of the used ring, or of the device's event suppression

	// NextAvail is where the device looks for the next chain: a free-running
	// index (split), a place in the ring (packed).
	NextAvail uint16 `cbor:"next_avail"`
	// NextUsed is where the next used element goes, likewise.
	NextUsed uint16 `cbor:"next_used"`
	// AvailFlipped and UsedFlipped: the wrap counter is 0 (packed; it starts
	// as 1).
	AvailFlipped bool `cbor:"avail_flipped"`
	UsedFlipped  bool `cbor:"used_flipped"`
	// Unsignalled counts what was used since the last [Queue.Notify]: elements
	// (split) or descriptors (packed), at most [MaxQueueSize].
	Unsignalled uint32 `cbor:"unsignalled"`
}

// Queue is a virtqueue, split or packed. Its methods may be called from several
// goroutines, and chains may be given back in any order. A request allocates
// nothing. A chain is out from [Queue.Next] until it is given back.
type Queue struct {
	mem       Memory
	max       uint16
	interrupt func()
	kick      chan struct{} // has a value when there may be requests

	ring sync.Mutex // guards all that follows, and the device's side of the ring
	idle sync.Cond  // out may have become 0
	s    QueueState
	// layout is what the ring is: nil when the queue is not enabled.
	layout   layout
	eventIdx bool
	indirect bool
	draining bool  // Next returns nothing
	err      error // sticky
	epoch    uint64
	seq      uint64
	out      int // chains that the device has
	outDescs int // their descriptors in the ring
	// kicksOn: the driver was asked to kick for what comes next.
	kicksOn bool
	one     [1]uint32 // Done's argument to publish

	desc, avail, used []byte // the three parts in guest memory; see QueueState
}

// layout is the split or the packed layout. Queue.ring is held in all methods.
type layout interface {
	// attach checks s and slices the ring's parts.
	attach() error
	// next fills c with the next chain, if there is one, and moves on.
	next(c *Chain) (bool, error)
	// rewind moves back before c, the last chain that next returned.
	rewind(c *Chain)
	// publish puts chains into the used ring. The driver sees all or none.
	publish(chains []Chain, written []uint32) error
	// interrupts reports whether the driver asks for an interrupt for the
	// Unsignalled ones.
	interrupts() bool
	// wantKicks tells the driver that the device is about to wait. It ends with
	// a full barrier, after which next must look again.
	wantKicks() error
}

// NewQueue makes a queue that is not enabled. max is its largest size, a power
// of 2. interrupt interrupts the driver; it is called without locks.
func NewQueue(mem Memory, max uint16, interrupt func()) *Queue {
	q := &Queue{mem: mem, max: max, interrupt: interrupt, kick: make(chan struct{}, 1)}
	q.idle.L = &q.ring
	return q
}

// MaxSize is the largest size of the queue in descriptors.
func (q *Queue) MaxSize() uint16 { return q.max }

// Size is the size in descriptors that the driver chose; 0 if the queue is not
// enabled.
func (q *Queue) Size() uint16 {
	q.ring.Lock()
	defer q.ring.Unlock()
	if q.layout == nil {
		return 0
	}
	return q.s.Size
}

// Start enables the queue in a state, new or saved. features are the negotiated
// ones. It fails if the size is invalid or the parts of the ring are not aligned
// or not RAM. It does not touch guest memory.
func (q *Queue) Start(s QueueState, features uint64) error {
	q.ring.Lock()
	defer q.ring.Unlock()
	if q.layout != nil {
		return fmt.Errorf("%w: the queue is enabled already", ErrRing)
	}
	if s.Size == 0 || s.Size > q.max {
		return fmt.Errorf("%w: the size must be between 1 and %d descriptors, got %d", ErrRing, q.max, s.Size)
	}
	q.s = s
	q.s.Enabled = true
	q.eventIdx = features&FeatureEventIdx != 0
	q.indirect = features&FeatureIndirectDesc != 0
	q.draining, q.err, q.out, q.outDescs, q.kicksOn = false, nil, 0, 0, false
	var l layout = (*split)(q)
	if features&FeatureRingPacked != 0 {
		l = (*packed)(q)
	}
	if err := l.attach(); err != nil {
		return fmt.Errorf("%w: %w", ErrRing, err)
	}
	q.layout = l
	return nil
}

// Quiesce makes Next return nothing any more.
func (q *Queue) Quiesce() {
	q.ring.Lock()
	defer q.ring.Unlock()
	q.draining = true
}

// Drain does what Quiesce does, and returns when no chain is out.
func (q *Queue) Drain() {
	q.ring.Lock()
	defer q.ring.Unlock()
	q.draining = true
	for q.layout != nil && q.out > 0 {
		q.idle.Wait()
	}
}

// Stop disables the queue. What a device then does with a chain that was out has
// no effect.
func (q *Queue) Stop() {
	q.ring.Lock()
	defer q.ring.Unlock()
	q.layout, q.desc, q.avail, q.used = nil, nil, nil, nil
	q.epoch++
	q.out, q.outDescs = 0, 0
	q.idle.Broadcast()
}

// SaveState returns the state of the queue. It fails with [ErrInFlight] while
// chains are out.
func (q *Queue) SaveState() (QueueState, error) {
	q.ring.Lock()
	defer q.ring.Unlock()
	if q.out > 0 {
		return QueueState{}, fmt.Errorf("virtqueue: %w: %d", ErrInFlight, q.out)
	}
	return q.s, nil
}

// Signal kicks the device: the [Loop] that serves the queue looks at it.
func (q *Queue) Signal() { signal(q.kick) }

// Next fills c with the next chain that the driver made available. If there is
// none, it asks the driver to kick, looks again, and returns false. An error
// wraps [ErrRing]; every later Next returns it, too. The device passes it to
// [Notifier.NeedsReset].
func (q *Queue) Next(c *Chain) (bool, error) {
	q.ring.Lock()
	defer q.ring.Unlock()
	c.reset()
	if q.layout == nil || q.draining {
		return false, nil
	}
	if q.err != nil {
		return false, q.err
	}
	ok, err := q.layout.next(c)
	if err == nil && !ok && !q.kicksOn {
		if err = q.layout.wantKicks(); err == nil {
			q.kicksOn = true
			ok, err = q.layout.next(c)
		}
	}
	if err == nil && ok && q.outDescs+int(c.descs) > int(q.s.Size) {
		err = fmt.Errorf("more than %d descriptors are in flight", q.s.Size)
	}
	if err != nil {
		c.reset()
		q.err = fmt.Errorf("%w: %w", ErrRing, err)
		return false, q.err
	}
	if !ok {
		return false, nil
	}
	q.kicksOn = false
	q.seq++
	q.out++
	q.outDescs += int(c.descs)
	c.queue, c.epoch, c.seq = q, q.epoch, q.seq
	return true, nil
}

// take notes that c is no longer out. It returns false if the queue was stopped
// after it had returned c.
func (q *Queue) take(c *Chain) (bool, error) {
	if c.queue != q {
		return false, fmt.Errorf("virtqueue: %w", ErrNotOut)
	}
	c.queue = nil
	if c.epoch != q.epoch || q.layout == nil {
		return false, nil
	}
	q.out--
	q.outDescs -= int(c.descs)
	if q.out == 0 {
		q.idle.Broadcast()
	}
	return true, nil
}

// Done gives the chain back as used, with the number of bytes at the beginning
// of its writable part that the device has written. Done marks those bytes
// dirty; the device marks the bytes that it has written behind them
// ([Chain.WriteAt] does). The driver is not interrupted before [Queue.Notify].
func (q *Queue) Done(c *Chain, written uint32) error {
	q.ring.Lock()
	defer q.ring.Unlock()
	if uint64(written) > c.writable {
		return fmt.Errorf("virtqueue: %d bytes written to a chain with room for %d", written, c.writable)
	}
	same, err := q.take(c)
	if err != nil || !same {
		return err
	}
	if err := c.markWritten(q.mem, uint64(written)); err != nil {
		return err
	}
	q.one[0] = written
	return q.layout.publish(unsafe.Slice(c, 1), q.one[:])
}

// DoneAll gives back several chains that hold one message: the driver sees all
// or none.
func (q *Queue) DoneAll(chains []Chain, written []uint32) error {
	q.ring.Lock()
	defer q.ring.Unlock()
	if len(chains) != len(written) {
		return fmt.Errorf("virtqueue: %d chains with %d lengths", len(chains), len(written))
	}
	for i := range chains {
		if uint64(written[i]) > chains[i].writable {
			return fmt.Errorf("virtqueue: %d bytes written to a chain with room for %d", written[i], chains[i].writable)
		}
	}
	all := len(chains) > 0
	for i := range chains {
		same, err := q.take(&chains[i])
		if err != nil {
			return err
		}
		all = all && same
	}
	if !all {
		return nil
	}
	for i := range chains {
		if err := chains[i].markWritten(q.mem, uint64(written[i])); err != nil {
			return err
		}
	}
	return q.layout.publish(chains, written)
}

// Rewind puts c back into the queue: the next Next returns it. c is the chain
// that Next returned last among those that are out.
func (q *Queue) Rewind(c *Chain) error {
	q.ring.Lock()
	defer q.ring.Unlock()
	if c.queue == q && c.epoch == q.epoch && c.seq != q.seq {
		return fmt.Errorf("virtqueue: rewind: %w as the last one", ErrNotOut)
	}
	same, err := q.take(c)
	if err != nil || !same {
		return err
	}
	q.seq--
	q.layout.rewind(c)
	return nil
}

// Drop takes back a chain without giving it to the driver, which has broken a
// rule, or has reset the queue or the device.
func (q *Queue) Drop(c *Chain) error {
	q.ring.Lock()
	defer q.ring.Unlock()
	_, err := q.take(c)
	return err
}

// Notify interrupts the driver if it asks for that because of what was used
// since the last Notify.
func (q *Queue) Notify() {
	if q.interrupts() {
		q.interrupt()
	}
}

// interrupts reports whether the driver wants an interrupt now.
func (q *Queue) interrupts() bool {
	q.ring.Lock()
	defer q.ring.Unlock()
	if q.layout == nil {
		return false
	}
	wants := q.s.Unsignalled > 0 && q.layout.interrupts()
	q.s.Unsignalled = 0
	return wants
}
