package snapshot

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// draft is a snapshot that is being written: the target of one session. Its directory has
// another name until all is there and on disk.
type draft struct {
	k        *keeper
	dir      string // draftPrefix and a number
	desc     machine.Description
	slots    []migrate.Slot
	first    []uint64 // the page of the file that a slot begins at
	memory   *os.File
	disks    []Disk
	state    []byte
	storage  []byte
	session  [16]byte
	manifest Manifest

	// A span is of whole words of these, and only one channel has it.
	seen, hot mempage.Bitmap // pages that were written, and more than once

	tempMu sync.Mutex // guards kept
	kept   bool       // it has its name
}

// draftPrefix begins the name of a snapshot that is not complete: after a crash it may be
// removed.
const draftPrefix = ".govmm-partial-"

var (
	_ migrate.PageWriter = (*draft)(nil)
	_ migrate.Target     = (*draft)(nil)
	_ migrate.Comparer   = (*draft)(nil)
)

// keeper is the builder of drafts.
type keeper struct {
	dir  string // what it will be called
	opt  Options
	work atomic.Pointer[work] // nil: none
}

// work is what a [Work] is read from.
type work struct {
	what string
	all  uint64
	done atomic.Uint64
}

// begins says what is done from here on, until it is called with nothing to do.
func (k *keeper) begins(what string, all uint64) *atomic.Uint64 {
	w := &work{what: what, all: all}
	if k.work.Store(w); all == 0 {
		k.work.Store(nil)
	}
	return &w.done
}

// Build begins a snapshot, see [migrate.Builder].
func (k *keeper) Build(_ context.Context, config []byte) (migrate.Target, error) {
	d, err := k.begin(config)
	if err != nil {
		return nil, kind.Told(err)
	}
	return d, nil
}

func (k *keeper) begin(config []byte) (_ *draft, err error) {
	d := &draft{k: k}
	if d.desc, err = machine.Describe(config); err != nil {
		return nil, err
	}
	if d.dir, err = os.MkdirTemp(filepath.Dir(k.dir), draftPrefix); err != nil {
		return nil, fmt.Errorf("begin the snapshot: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Discard())
		}
	}()
	at := uint64(0)
	for _, s := range memory.Layout(d.desc.Memory) {
		d.slots = append(d.slots, migrate.Slot{GPA: s.GPA, Pages: s.Size / mempage.Size})
		d.first = append(d.first, at)
		at += s.Size / mempage.Size
	}
	d.seen, d.hot = mempage.NewBitmap(at), mempage.NewBitmap(at)
	if d.memory, err = d.create(memoryFile); err != nil {
		return nil, err
	}
	if err := d.memory.Truncate(int64(d.desc.Memory)); err != nil {
		return nil, fmt.Errorf("make a file of %d bytes for memory: %w", d.desc.Memory, err)
	}
	for i, s := range d.desc.Disks {
		d.disks = append(d.disks, Disk{Path: s.Path, Bytes: s.Size, ReadOnly: s.ReadOnly, Kept: k.opt.Disks})
		if k.opt.Disks != DisksNone {
			if err := d.canRead(i); err != nil {
				return nil, err
			}
		}
	}
	d.manifest = Manifest{Format: formatVersion, Features: []string{}, Govmm: k.opt.Version, Name: d.desc.Name, CPUs: d.desc.CPUs,
		Memory: RAM{Bytes: d.desc.Memory, Compression: k.opt.Compress}, Disks: []Disk{}, Parts: map[string]Part{}}
	for name, b := range map[string][]byte{specFile: d.desc.Spec, kernelFile: d.desc.Kernel, initrdFile: d.desc.Initrd} {
		if len(b) > 0 {
			if err := d.write(name, b); err != nil {
				return nil, err
			}
		}
	}
	d.desc.Kernel, d.desc.Initrd, d.desc.Spec = nil, nil, nil
	return d, nil
}

// create makes a file of the draft.
func (d *draft) create(name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(d.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make a file of the snapshot: %w", err)
	}
	return f, nil
}

// write writes a part, durably.
func (d *draft) write(name string, b []byte) error {
	f, err := d.create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the snapshot: %w", err)
	}
	d.manifest.Parts[name] = Part{Bytes: int64(len(b)), SHA256: sumOf(b)}
	return nil
}

// Slots implements [migrate.RAM].
func (d *draft) Slots() []migrate.Slot { return d.slots }

// Bytes implements [migrate.RAM]; there is no memory, and nobody calls it.
func (d *draft) Bytes(int, uint64, uint64) []byte { return nil }

// Prefault implements [migrate.Target].
func (d *draft) Prefault(int, uint64, uint64) error { return errors.ErrUnsupported }

// at is where a page of a slot is in the file.
func (d *draft) at(slot int, page uint64) int64 {
	return int64((d.first[slot] + page) << mempage.Shift)
}

// Populated implements [migrate.RAM].
func (d *draft) Populated(slot int, first, n uint64, bitmap []uint64) error {
	b := mempage.Bitmap(bitmap[:mempage.Words(n)])
	clear(b)
	start := d.at(slot, first)
	err := memory.Extents(int(d.memory.Fd()), start, start+int64(n<<mempage.Shift), func(from, to int64) error {
		lo, hi := uint64(from-start)>>mempage.Shift, uint64(to-start+mempage.Size-1)>>mempage.Shift
		b.SetRange(lo, hi-lo)
		return nil
	})
	return d.failed("look for holes", err)
}

// Zero implements [migrate.RAM].
func (d *draft) Zero(slot int, first, n uint64) error {
	at, size := d.at(slot, first), int64(n<<mempage.Shift)
	err := unix.Fallocate(int(d.memory.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, size)
	if errors.Is(err, unix.EOPNOTSUPP) { // then it is written
		_, err = d.memory.WriteAt(make([]byte, size), at)
	}
	return d.failed("make a hole", err)
}

// WritePages implements [migrate.PageWriter].
func (d *draft) WritePages(slot int, first uint64, span []byte, data []uint64) error {
	page := d.first[slot] + first
	for w, word := range data {
		at := page/mempage.WordBits + uint64(w)
		d.hot[at] |= d.seen[at] & word
		d.seen[at] |= word
		for left := word; left != 0; { // runs
			lo := bits.TrailingZeros64(left)
			n := bits.TrailingZeros64(^(left >> lo))
			from := (w*mempage.WordBits + lo) * mempage.Size
			if _, err := d.memory.WriteAt(span[from:from+n*mempage.Size], int64(page<<mempage.Shift)+int64(from)); err != nil {
				return d.failed("write", err)
			}
			if lo+n >= 64 {
				break
			}
			left &^= (1<<n - 1) << lo
		}
	}
	if d.k.opt.Compress == CompressNone {
		// It begins to go to the disk now: what is left for the end is little, and the
		// stop does not wait for room in the host's cache.
		_ = unix.SyncFileRange(int(d.memory.Fd()), int64(page<<mempage.Shift), int64(len(span)), unix.SYNC_FILE_RANGE_WRITE)
	}
	return nil
}

// failed gives an error of the file of memory its words.
func (d *draft) failed(what string, err error) error {
	if err == nil {
		return nil
	}
	if path := (*os.PathError)(nil); errors.As(err, &path) {
		err = path.Err // the name is not the one that the user gave
	}
	return kind.Told(fmt.Errorf("%s, memory in %s: %w", what, filepath.Dir(d.k.dir), err))
}

// PrepareState implements [migrate.Target].
func (d *draft) PrepareState(state []byte) error {
	d.state = state
	return nil
}

// CompareStorage implements [migrate.Comparer]: who restores the guest compares.
func (d *draft) CompareStorage(_ context.Context, session [16]byte, samples []byte) error {
	d.session, d.storage = session, samples
	return nil
}

// LoadState implements [migrate.Target]: the guest stands still, and memory is complete.
func (d *draft) LoadState(ctx context.Context, _ []byte) error {
	return kind.Told(d.keepDisks(ctx))
}

// UnloadState implements [migrate.Target].
func (d *draft) UnloadState(context.Context) error { return kind.Told(d.dropDisks()) }

// Start implements [migrate.Target]: it keeps the snapshot.
func (d *draft) Start(ctx context.Context, _ bool) error { return kind.Told(d.finish(ctx)) }

// Discard implements [migrate.Target].
func (d *draft) Discard() error {
	d.tempMu.Lock()
	defer d.tempMu.Unlock()
	if d.kept {
		return nil
	}
	if d.memory != nil {
		_ = d.memory.Close()
	}
	return os.RemoveAll(d.dir)
}

func (d *draft) sessionText() string { return hex.EncodeToString(d.session[:]) }
