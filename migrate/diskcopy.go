package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/mempage"
)

// diskCopy sends a guest's disks. A nil one has none. Passes over the disks and over
// memory do not overlap, so both use all connections.
type diskCopy struct {
	link    *link
	disks   blockLog
	tracker *tracker
	meter   *meter
	opt     Options
	rounds  uint64
	lanes   chan *lane // those that no worker writes to
	// sent has a bit for every block that was ever sent: as a hole or as zeros it must go
	// as zero from then on (R6). A word belongs to the worker that picked its blocks.
	sent []mempage.Bitmap
	// halted ends a pass before its end; nil: nothing does.
	halted *atomic.Bool

	cursorMu sync.Mutex // guards disk, block: where the pass is
	disk     int
	block    uint64

	bytes atomic.Uint64 // of content that was sent
}

// newDiskCopy begins to record what the guest writes to its disks.
func newDiskCopy(l *link, disks blockLog, m *meter, opt Options) (*diskCopy, error) {
	if len(disks) == 0 {
		return nil, nil
	}
	d := &diskCopy{link: l, disks: disks, meter: m, opt: opt, lanes: make(chan *lane, len(l.data))}
	for _, n := range l.data {
		d.lanes <- n
	}
	var size uint64
	for _, s := range disks.slots() {
		d.sent = append(d.sent, mempage.NewBitmap(s.Pages))
	}
	for _, one := range disks {
		size += one.Size()
	}
	var err error
	if d.tracker, err = newTracker(disks.slots(), disks, opt.ClearBitmapShift); err != nil {
		return nil, err
	}
	m.update(func(m *meter) { m.progress.DiskBytes, m.result.DiskBytes = size, size })
	if err := d.tracker.Start(); err != nil {
		return nil, errors.Join(err, disks.StopDirtyLog())
	}
	return d, nil
}

// end ends the recording. A source whose guest has gone need not call it.
func (d *diskCopy) end() {
	if d != nil {
		_ = d.disks.StopDirtyLog()
	}
}

// remaining is how many pages would be as much as what is left of the disks.
func (d *diskCopy) remaining() uint64 {
	if d == nil {
		return 0
	}
	return d.tracker.Remaining() * pagesOfBlock
}

// left says how much is left, where precopy did not converge.
func (d *diskCopy) left() string {
	if d == nil {
		return ""
	}
	return fmt.Sprintf(" (%d MiB of its disks are left, to which it writes faster than they can be copied, unless its memory is the reason)",
		d.tracker.Remaining()*BlockSize>>20)
}

// moved is how many bytes of content were sent so far.
func (d *diskCopy) moved() uint64 {
	if d == nil {
		return 0
	}
	return d.bytes.Load()
}

// sync fetches what the guest has written.
func (d *diskCopy) sync() error {
	if d == nil {
		return nil
	}
	defer d.tell()
	return d.tracker.Sync()
}

// tell tells how much is left.
func (d *diskCopy) tell() {
	left, sent := d.tracker.Remaining()*BlockSize, d.bytes.Load()
	d.meter.update(func(m *meter) {
		m.progress.DiskRemainingBytes, m.progress.DiskBytesSent, m.result.DiskBytesSent = left, sent, sent
	})
}

// enough is how long the link may take for what is left of the disks when memory follows.
const enough = time.Second

// first copies the disks, and then what the guest has written to them meanwhile, until the
// rest is small or passes no longer shrink. Room for all of it is reserved before.
func (d *diskCopy) first(ctx context.Context) error {
	if d == nil {
		return nil
	}
	if err := d.reserve(ctx); err != nil {
		return err
	}
	var limit *limiter
	if d.opt.BandwidthLimit > 0 {
		limit = &limiter{rate: d.opt.BandwidthLimit}
	}
	for left := d.tracker.Remaining(); ; {
		began, before := time.Now(), d.moved()
		if err := d.pass(ctx, limit); err != nil {
			return err
		}
		took := time.Since(began)
		was := left
		left = d.tracker.Remaining()
		rate := float64(d.moved()-before) / max(took.Seconds(), 1e-6)
		d.meter.update(func(m *meter) { m.progress.BandwidthBytes = uint64(rate) })
		if left > was/2 || float64(left*BlockSize) <= rate*enough.Seconds() {
			return nil
		}
	}
}

// pass sends what the tracker has to send, waits until it is durable there, and fetches
// what the guest has written meanwhile.
func (d *diskCopy) pass(ctx context.Context, limit *limiter) error {
	if err := d.send(ctx, limit); err != nil {
		return err
	}
	if err := d.barrier(ctx); err != nil {
		return err
	}
	return d.sync()
}

// reserve has the destination reserve room for what is not a hole.
func (d *diskCopy) reserve(ctx context.Context) error {
	for i, disk := range d.disks {
		for off := uint64(0); ; {
			start, end, err := disk.NextData(off)
			if err != nil {
				return err
			}
			if start >= disk.Size() {
				break
			}
			first := start / BlockSize
			n := min(blocksOf(end)-first, 1<<31)
			if err := d.write(ctx, header{typ: frameBlocks, flags: flagReserve, slot: uint16(i), first: first, count: uint32(n)}); err != nil {
				return err
			}
			off = (first + n) * BlockSize
		}
	}
	return d.barrier(ctx)
}

// barrier waits until all that was sent has landed and is durable.
func (d *diskCopy) barrier(ctx context.Context) error {
	number := diskRound + d.rounds
	d.rounds++
	if err := d.link.endRound(number, flagDurable); err != nil {
		return err
	}
	r, err := d.link.await(ctx, frameRound)
	if err == nil && r.first != number {
		err = fmt.Errorf("%w: the destination confirmed round %#x instead of %#x", ErrProtocol, r.first, number)
	}
	return err
}

// diskRound is the number of the first round of disks alone.
const diskRound = 1 << 32

// send sends the blocks that the tracker has to send, and returns when all of them have
// been written. What [sender.send] promises of errors and halts holds here.
func (d *diskCopy) send(ctx context.Context, limit *limiter) error {
	if d == nil || d.tracker.Remaining() == 0 {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	d.disk, d.block = 0, 0
	var all sync.WaitGroup
	for range cap(d.lanes) {
		w := &blockWorker{diskCopy: d, buf: make([]byte, blocksOfFrame*BlockSize)}
		all.Go(func() {
			if err := w.run(ctx, limit); err != nil {
				cancel(err) // the first one is the reason
			}
		})
	}
	all.Wait()
	d.tell()
	return context.Cause(ctx)
}

// next picks blocks: bit i of picked is block first+i. It returns 0 when the pass is over.
func (d *diskCopy) next() (disk int, first, picked uint64, err error) {
	d.cursorMu.Lock()
	defer d.cursorMu.Unlock()
	var word [1]uint64
	for d.disk < len(d.disks) {
		first, n, err := d.tracker.Pick(d.disk, d.block, mempage.WordBits, word[:])
		if err != nil {
			return 0, 0, 0, err
		}
		if n > 0 {
			d.block = first + mempage.WordBits
			return d.disk, first, word[0], nil
		}
		d.disk, d.block = d.disk+1, 0
	}
	return 0, 0, 0, nil
}

// write writes a frame to a connection that is free.
func (d *diskCopy) write(ctx context.Context, h header, payload ...[]byte) error {
	var lane *lane
	select {
	case lane = <-d.lanes:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	n := uint64(headerSize)
	for _, p := range payload {
		n += uint64(len(p))
	}
	c, err := d.link.room(lane, n)
	if err == nil {
		err = c.writeFrame(h, payload...)
	}
	if err != nil {
		return d.link.channelEnded(err)
	}
	d.lanes <- lane
	return nil
}

// blockWorker sends some blocks at a time.
type blockWorker struct {
	*diskCopy
	buf []byte
	own uint64 // bytes of content that it has sent
}

func (w *blockWorker) run(ctx context.Context, limit *limiter) error {
	for {
		if err := context.Cause(ctx); err != nil || w.halted != nil && w.halted.Load() {
			return err
		}
		disk, first, picked, err := w.next()
		if err != nil || picked == 0 {
			return err
		}
		before := w.own
		for picked != 0 {
			from := uint64(bits.TrailingZeros64(picked))
			n := uint64(bits.TrailingZeros64(^(picked >> from)))
			if err := w.sendRun(ctx, disk, first+from, first+from+n); err != nil {
				return err
			}
			if from+n == mempage.WordBits {
				break
			}
			picked &^= (1<<n - 1) << from
		}
		w.tell()
		if err := limit.wait(ctx, w.own-before); err != nil {
			return err
		}
	}
}

// sendRun sends blocks [from, to). They are armed (R1): only from here on may they be
// read.
func (w *blockWorker) sendRun(ctx context.Context, disk int, from, to uint64) error {
	for from < to {
		start, end, err := w.disks[disk].NextData(from * BlockSize)
		if err != nil {
			return err
		}
		data := min(to, max(from, start/BlockSize)) // a block with some data is one with data
		if start >= w.disks[disk].Size() {
			data = to
		}
		if err := w.zero(ctx, disk, from, data); err != nil {
			return err
		}
		for from = data; from < min(to, blocksOf(end)); {
			n := min(to, blocksOf(end), from+blocksOfFrame) - from
			if err := w.sendData(ctx, disk, from, from+n); err != nil {
				return err
			}
			from += n
		}
	}
	return nil
}

// sendData sends blocks [from, to) of a disk with their content, unless that is zeros.
func (w *blockWorker) sendData(ctx context.Context, disk int, from, to uint64) error {
	d := w.disks[disk]
	content := w.buf[:min(to*BlockSize, d.Size())-from*BlockSize]
	if err := d.ReadBlocks(content, from*BlockSize); err != nil {
		return err
	}
	for len(content) > 0 {
		zeros := isZero(content[:min(BlockSize, len(content))])
		n := min(BlockSize, len(content))
		for n < len(content) && isZero(content[n:min(n+BlockSize, len(content))]) == zeros {
			n = min(n+BlockSize, len(content))
		}
		blocks := blocksOf(uint64(n))
		if zeros {
			if err := w.zero(ctx, disk, from, from+blocks); err != nil {
				return err
			}
		} else {
			w.sent[disk].SetRange(from, blocks)
			h := header{typ: frameBlocks, slot: uint16(disk), first: from, count: uint32(blocks)}
			if err := w.write(ctx, h, content[:n]); err != nil {
				return err
			}
			w.bytes.Add(uint64(n))
			w.own += uint64(n)
		}
		content, from = content[n:], from+blocks
	}
	return nil
}

// zero says that blocks [from, to) read as zeros, where the destination may not know it.
func (w *blockWorker) zero(ctx context.Context, disk int, from, to uint64) error {
	for from < to {
		if from = w.sent[disk].NextSet(from, to); from == to {
			return nil
		}
		end := w.sent[disk].NextClear(from, to)
		h := header{typ: frameBlocks, flags: flagZero, slot: uint16(disk), first: from, count: uint32(end - from)}
		if err := w.write(ctx, h); err != nil {
			return err
		}
		from = end
	}
	return nil
}
