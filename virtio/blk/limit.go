package blk

import "github.com/govmm/govmm/virtio"

// server is what a worker does with a queue. A disk without limits asks nobody.
func (w *worker) server(q *virtio.Queue) virtio.Server {
	s := virtio.Server{Queue: q, Serve: w.serve, Parallel: true}
	if w.d.limit != nil {
		s.Ready, s.Empty = w.d.limit.Ready, w.none
	}
	return s
}

// none tells the limit that there was no request.
func (w *worker) none([]virtio.Chain, []uint32) int {
	w.d.limit.Spend(0, 0)
	return virtio.Keep
}

// count counts a request against the limits before it is carried out: whatever becomes
// of it, it is an operation, and each range of a discard is one. Data counts in bytes,
// as do zeros ([worker.writeZeroes]), which the storage may have to write. room is that
// for data which the device writes.
func (w *worker) count(kind uint32, c *virtio.Chain, room int) {
	ops, bytes, sent := 1, 0, c.ReadableLen()-headerSize
	switch kind {
	case typeIn:
		bytes = min(room, maxTransfer)
	case typeOut:
		bytes = min(sent, maxTransfer)
	case typeDiscard:
		ops = min(max(sent/rangeSize, 1), maxDiscardRanges)
	}
	w.d.limit.Spend(ops, bytes)
}
