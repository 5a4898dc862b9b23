package migrate

import (
	"errors"
	"fmt"
	"slices"

	"github.com/govmm/govmm/mempage"
)

// A disk that moves along is memory with bigger pages. Its blocks are recorded as dirty
// before the guest hears that a write is done, are taken by a tracker of their own, and
// travel by the same data channels, so R1, R4, R5 and R6 hold for them word for word; R2
// and R3 have nothing to say, since taking a record clears it and nobody hints blocks.
// The first passes come before the rounds of memory, whose dirty log is still off; later
// each round begins with what the guest wrote to its disks meanwhile.

const (
	// BlockShift and BlockSize are the unit in which a disk that moves along is recorded
	// and sent: 64 KiB. The last block of a disk may be shorter.
	BlockShift = 16
	BlockSize  = 1 << BlockShift

	// blocksOfFrame is the most blocks of content in one BLOCKS frame.
	blocksOfFrame = 16
	// pagesOfBlock is how many pages are as much as one block.
	pagesOfBlock = BlockSize / mempage.Size
)

// Flags of BLOCKS: what it says of its blocks. Without one their content follows.
const (
	flagZero    uint8 = 1 << 0 // they read as zero
	flagReserve uint8 = 1 << 1 // they will come, and room is reserved for them
)

// Disk is a disk of a guest at the source of a migration. It stays what it is when the
// guest is reset. Offsets and lengths are bytes.
type Disk interface {
	Size() uint64
	// StartBlockLog begins to record which blocks of so many bytes change, in any way. A
	// block is recorded after the change has been made, and before the guest can learn
	// that it is.
	StartBlockLog(block uint64) error
	// StopBlockLog ends that, also if it has not begun.
	StopBlockLog()
	// FetchBlocks takes what was recorded, atomically, and calls each for every word that
	// has bits: bit i of word w is block 64*w+i.
	FetchBlocks(each func(w int, word uint64))
	// ReadBlocks fills p with what the disk has from off.
	ReadBlocks(p []byte, off uint64) error
	// NextData returns the first range at or after off that is not a hole, which reads as
	// zeros; start is the disk's size if there is none. Where holes are not known all is
	// data.
	NextData(off uint64) (start, end uint64, err error)
}

// DiskSource is a [Source] whose guest has disks that can move along
// ([Options.CopyDisks]).
type DiskSource interface {
	// Disks lists all disks of the guest. Their numbers are those of its [Target].
	Disks() []Disk
}

// DiskTarget is a [Target] that can take disks.
type DiskTarget interface {
	// DiskCopies lists the disks that must be copied here, by ascending number: those
	// that this host does not share with the source.
	DiskCopies() []DiskCopy
}

// DiskCopy is a disk that is being copied to the destination. It reads as zeros at first,
// and vanishes with [Target.Discard]. Its methods are called by several goroutines, for
// ranges that do not meet.
type DiskCopy interface {
	Number() int // of [DiskSource.Disks]
	Size() uint64
	Reserve(off, n uint64) error // room for the range, which will be written
	Write(p []byte, off uint64) error
	Zero(off, n uint64) error // the range reads as zeros, and takes no room where that is possible
	Sync() error              // makes durable what was written before
}

// blockLog is the record of writes to disks, as a [DirtyLog] in which the VMM writes all.
type blockLog []Disk

func (l blockLog) StartDirtyLog() error {
	for _, d := range l {
		if err := d.StartBlockLog(BlockSize); err != nil {
			return err
		}
	}
	return nil
}

func (l blockLog) StopDirtyLog() error {
	for _, d := range l {
		d.StopBlockLog()
	}
	return nil
}

func (l blockLog) ManualProtect() bool { return false }

func (l blockLog) FetchDirtyLog(_ int, bitmap []uint64) error {
	clear(bitmap)
	return nil
}

func (l blockLog) ClearDirtyLog(int, uint64, uint64, []uint64) error {
	return errors.New("the record of a disk is not cleared by pages")
}

func (l blockLog) FetchVMMDirty(disk int, each func(w int, word uint64)) error {
	l[disk].FetchBlocks(each)
	return nil
}

// slots are the disks as a tracker sees them.
func (l blockLog) slots() (list []Slot) {
	for _, d := range l {
		list = append(list, Slot{Pages: blocksOf(d.Size())})
	}
	return list
}

// blocksOf is how many blocks a disk of size bytes has.
func blocksOf(size uint64) uint64 { return size/BlockSize + min(1, size%BlockSize) }

// readyMsg is the payload of READY, if disks are copied.
type readyMsg struct {
	// Disks are the numbers of the disks that the destination needs. BLOCKS name them by
	// their place in this list.
	Disks []uint16 `cbor:"disks"`
}

// ready is what the destination says when the machine is built.
func (s *session) readyMsg(target Target) (msg readyMsg, err error) {
	t, ok := target.(DiskTarget)
	if !ok {
		return msg, nil
	}
	s.copies = t.DiskCopies()
	for _, c := range s.copies {
		msg.Disks = append(msg.Disks, uint16(c.Number()))
	}
	if len(s.copies) > 0 && !slices.Contains(s.features, featureDisks) {
		return msg, openly("this host keeps copies of the guest's disks, and the source does not copy them: it needs --copy-disks")
	}
	return msg, nil
}

// wanted returns the disks that READY asks for.
func wanted(r reply, disks []Disk) (list blockLog, err error) {
	var msg readyMsg
	if err := decodeControl(r.typ, r.payload, &msg); err != nil {
		return nil, err
	}
	last := -1
	for _, n := range msg.Disks {
		if int(n) <= last || int(n) >= len(disks) {
			return nil, fmt.Errorf("%w: READY asks for disk %d of %d after disk %d", ErrProtocol, n, len(disks), last)
		}
		last = int(n)
		list = append(list, disks[n])
	}
	return list, nil
}
