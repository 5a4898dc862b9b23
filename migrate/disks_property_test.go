package migrate_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
	"pgregory.net/rapid"
)

// moveDisks moves a machine over a network with its own mind, and fails unless the guest
// is on one side afterwards.
func moveDisks(t *rapid.T, w *simtest.World, m *simtest.Machine, b *simtest.Builder, opt migrate.Options, cutAt int) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := migrate.NewReceiver(b, nil)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	j, err := newJitter(ln.Addr().String(), rapid.Uint64().Draw(t, "network"), cutAt)
	if err != nil {
		t.Fatal(err)
	}
	mig := migrate.New(m, j.ln.Addr().String(), opt)
	mig.HurryGuard(100 * time.Millisecond)
	_, err = mig.Run(ctx)
	if err == nil {
		<-r.Arrived()
	}
	stop()
	if serr := <-served; serr != nil {
		t.Fatal(serr)
	}
	j.close()
	if w.Arrivals() == 1 != (err == nil) {
		t.Fatalf("%d arrivals after %v", w.Arrivals(), err)
	}
	if err != nil && !m.Running() {
		t.Fatalf("the guest does not run on after %v", err)
	}
	return err
}

func diskMachine(t *rapid.T, w *simtest.World) *simtest.Machine {
	c := simtest.Config{
		Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: rapid.Uint64Range(1, 600).Draw(t, "pages")}}, ManualProtect: true},
		CPUs:   2, Seed: rapid.Uint64().Draw(t, "seed"), Dirty: rapid.Uint64Range(1, 100).Draw(t, "dirty"), Rate: 20000, Devices: 50,
		DiskWrites: rapid.IntRange(1, 200).Draw(t, "disk writes"), DiskDirty: rapid.Uint64Range(1<<10, 4<<20).Draw(t, "disk dirty"),
		DiskFill: rapid.Uint64Range(0, 6<<20).Draw(t, "disk fill") &^ 511,
	}
	for range rapid.IntRange(1, 3).Draw(t, "disks") {
		c.Disks = append(c.Disks, 512*rapid.Uint64Range(1, 20000).Draw(t, "sectors"))
	}
	m, err := simtest.NewMachine(w, c)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func resume(t *rapid.T, m *simtest.Machine) {
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
}

// For any number of channels, any order of arrival and any place of a cut, with stops that
// are undone: every block of every disk has what was written last.
func TestDisksLoseNoBlock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := simtest.NewWorld()
		defer w.Close()
		m := diskMachine(t, w)
		resume(t, m)
		cutAt := 0
		if rapid.Bool().Draw(t, "cut") {
			cutAt = rapid.IntRange(1, 12<<20).Draw(t, "cut at")
		}
		opt := migrate.Options{CopyDisks: true, MaxRounds: 30, Channels: rapid.IntRange(1, 4).Draw(t, "channels"),
			AutoConverge: rapid.Bool().Draw(t, "auto-converge")}
		b := &simtest.Builder{World: w, SharedDisks: rapid.IntRange(0, len(m.Disks())).Draw(t, "shared")}
		var loads atomic.Int32
		undo := int32(max(0, rapid.IntRange(-4, 2).Draw(t, "stops undone")))
		b.Steps.Load = func() error { // the guard undoes such a stop
			if loads.Add(1) <= undo {
				time.Sleep(300 * time.Millisecond)
			}
			return nil
		}
		opt.DowntimeLimit = 100 * time.Millisecond
		err := moveDisks(t, w, m, b, opt, cutAt)
		if err != nil && cutAt == 0 && !errors.Is(err, migrate.ErrNotConverged) {
			t.Fatal(err)
		}
		if err := w.Err(); err != nil {
			t.Fatal(err)
		}
	})
}

// A write that the record does not have is found by the test above.
func TestDisksLostWriteIsFound(t *testing.T) {
	found := false
	rapid.Check(t, func(t *rapid.T) {
		if found {
			return
		}
		w := simtest.NewWorld()
		defer w.Close()
		m := diskMachine(t, w)
		m.Disk(0).Lose = func() bool { return true } // before a vCPU looks
		resume(t, m)
		err := moveDisks(t, w, m, &simtest.Builder{World: w}, migrate.Options{CopyDisks: true, MaxRounds: 30}, 0)
		if err == nil && w.Err() != nil && strings.Contains(w.Err().Error(), "lost block") {
			found = true
		}
	})
	if !found {
		t.Error("no migration has lost a block whose writes were not recorded")
	}
}

// A destination that shares no disks is refused by a source that does not copy, and one
// that does not know how to take disks refuses a source that does.
func TestDisksAreNotCopiedByChance(t *testing.T) {
	w := simtest.NewWorld()
	defer w.Close()
	m, err := simtest.NewMachine(w, simtest.Config{Layout: simtest.Layout{Slots: []migrate.Slot{{Pages: 64}}}, CPUs: 1, Disks: []uint64{1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	r := migrate.NewReceiver(&simtest.Builder{World: w}, nil)
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	_, err = migrate.New(m, ln.Addr().String(), migrate.Options{}).Run(ctx)
	if !errors.Is(err, migrate.ErrRefused) || !strings.Contains(err.Error(), "--copy-disks") {
		t.Errorf("without CopyDisks: %v", err)
	}
	res, err := migrate.New(m, ln.Addr().String(), migrate.Options{CopyDisks: true}).Run(ctx)
	if err != nil || res.DiskBytes != 1<<20 {
		t.Errorf("with CopyDisks: %v, %d bytes of disks", err, res.DiskBytes)
	}
	stop()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
}
