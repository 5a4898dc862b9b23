package migrate

import (
	"bytes"
	"context"
	"errors"
	"math/bits"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// keptTarget keeps a guest in a file that is a slice.
type keptTarget struct {
	heapTarget
	file   sync.Mutex
	kept   *atomic.Pointer[keptTarget]
	cannot error // keep
}

var _ PageWriter = (*keptTarget)(nil)

func (k *keptTarget) WritePages(slot int, first uint64, span []byte, data []uint64) error {
	k.file.Lock()
	defer k.file.Unlock()
	for w, word := range data {
		for left := word; left != 0; left &= left - 1 {
			at := uint64(w*64 + bits.TrailingZeros64(left))
			copy(k.heapTarget.Bytes(slot, first+at, 1), span[at*mempage.Size:][:mempage.Size])
		}
	}
	return nil
}

// Bytes is not for a target without memory.
func (k *keptTarget) Bytes(int, uint64, uint64) []byte {
	k.t.Error("there is no memory at the destination")
	return nil
}

func (k *keptTarget) Zero(slot int, first, n uint64) error {
	k.file.Lock()
	defer k.file.Unlock()
	return k.heapTarget.Zero(slot, first, n)
}

func (k *keptTarget) Prefault(int, uint64, uint64) error { return errors.ErrUnsupported }

func (k *keptTarget) Start(context.Context, bool) error {
	if k.cannot == nil {
		k.kept.Store(k)
	}
	return k.cannot
}

// keeping starts a receiver that keeps guests.
func keeping(t *testing.T, timeout time.Duration, cannot error) (address string, kept *atomic.Pointer[keptTarget]) {
	kept = new(atomic.Pointer[keptTarget])
	r := NewKeeper(buildFunc(func(context.Context, []byte) (Target, error) {
		return &keptTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, kept: kept, cannot: cannot}, nil
	}))
	r.timeout = timeout
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String(), kept
}

// snapshotOf takes a snapshot of a guest, and checks who runs afterwards: the source,
// unless the guest was to end and its snapshot is there.
func snapshotOf(t *testing.T, address string, kept *atomic.Pointer[keptTarget], stop bool, patience time.Duration, compress Compression) error {
	t.Helper()
	runs := &whoRuns{t: t, who: map[string]bool{}}
	src := newToySource(t, runs)
	opt := testOptions()
	opt.PeerTimeout, opt.Channels, opt.Snapshot, opt.Compression = patience, 3, &Snapshot{Stop: stop}, compress
	m := New(src, address, opt)
	_, err := m.Run(context.Background())
	k := kept.Load()
	switch {
	case errors.Is(err, ErrHandoffUnknown):
		t.Errorf("nobody else can run the guest, and the source does not know: %v", err)
	case err == nil && k == nil:
		t.Error("the source was told that it is kept, and it is not")
	case runs.is("source") != (err != nil || !stop):
		t.Errorf("stop %v, %v: the source runs its guest: %v", stop, err, runs.is("source"))
	}
	if k != nil {
		for i := range src.mem {
			if !bytes.Equal(k.mem[i], src.mem[i]) {
				t.Errorf("slot %d is not as at the source", i)
			}
		}
	}
	return err
}

// TestSnapshotIsKept: what is kept is the guest's memory, and the guest goes on, or ends;
// if it cannot be kept the guest goes on.
func TestSnapshotIsKept(t *testing.T) {
	for _, stop := range []bool{false, true} {
		for _, c := range []Compression{CompressNone, CompressLZ4, CompressZstd} {
			address, kept := keeping(t, 10*time.Second, nil)
			if err := snapshotOf(t, address, kept, stop, 10*time.Second, c); err != nil {
				t.Errorf("stop %v, %s: %v", stop, c, err)
			}
		}
		address, kept := keeping(t, 10*time.Second, openly("the disk is full"))
		if err := snapshotOf(t, address, kept, stop, 10*time.Second, CompressNone); err == nil || !strings.Contains(err.Error(), "the disk is full") ||
			!strings.Contains(err.Error(), "the guest goes on here") {
			t.Errorf("stop %v, cannot be kept: %v", stop, err)
		}
	}
}

// TestSnapshotIsNoMigration: a receiver that would run the guest refuses a snapshot by its
// feature's name, and one that keeps guests takes nothing else.
func TestSnapshotIsNoMigration(t *testing.T) {
	rig := newRig(t)
	opt := testOptions()
	opt.Snapshot = &Snapshot{}
	_, err := New(rig.src, rig.addr, opt).Run(context.Background())
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "snapshot") || !rig.runs.is("source") || rig.runs.is("destination") {
		t.Errorf("a snapshot at a receiver: %v", err)
	}
	address, kept := keeping(t, 10*time.Second, nil)
	_, err = New(rig.src, address, testOptions()).Run(context.Background())
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "expected a snapshot") || !rig.runs.is("source") || kept.Load() != nil {
		t.Errorf("a guest that moves, at one that keeps guests: %v", err)
	}
	for _, wrong := range []Options{{Snapshot: &Snapshot{Patience: -1}}, {Snapshot: &Snapshot{}, VerifyPages: true}, {Snapshot: &Snapshot{}, SharedMemory: true}} {
		if wrong.Validate() == nil {
			t.Errorf("%+v is valid", wrong)
		}
	}
}

// TestSnapshotFaultAtEveryFrame: at whatever frame a connection ends or falls silent, the
// guest goes on at the source, unless it was to end and was kept.
func TestSnapshotFaultAtEveryFrame(t *testing.T) {
	var faults []fault
	for _, typ := range []frameType{frameConfig, framePages, frameRound, frameState, frameCommit, frameHelloOK, frameReady, framePrepared, frameRunning} {
		faults = append(faults, fault{toSource: typ >= frameHelloOK, typ: typ})
	}
	faults = append(faults, fault{typ: frameRound, toSource: true}, fault{typ: frameRound, channel: 2, flags: flagLast})
	for _, f := range faults {
		for _, f.after = range []bool{false, true} {
			for _, f.hang = range []bool{false, true} {
				for _, stop := range []bool{false, true} {
					name := f.String()
					if stop {
						name += ", the guest is to end"
					}
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						for _, patience := range []time.Duration{300 * time.Millisecond, 3 * time.Second, 30 * time.Second} {
							address, kept := keeping(t, patience, nil)
							proxy := startProxy(t, address, f, func() {})
							_ = snapshotOf(t, proxy.ln.Addr().String(), kept, stop, patience, CompressNone)
							select {
							case <-proxy.struck:
								return
							case <-time.After(2 * time.Second): // it may strike behind the last frame
							}
						}
						t.Error("the fault never struck")
					})
				}
			}
		}
	}
}
