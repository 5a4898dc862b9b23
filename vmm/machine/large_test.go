package machine

import (
	"net"
	"sync/atomic"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
)

// countedSource counts what a migration asks of KVM and the kernel for all of memory.
type countedSource struct {
	*source
	gets, clears, looks atomic.Int64
}

func (s *countedSource) FetchDirtyLog(slot int, bitmap []uint64) error {
	s.gets.Add(1)
	return s.source.FetchDirtyLog(slot, bitmap)
}

func (s *countedSource) ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error {
	s.clears.Add(1)
	return s.source.ClearDirtyLog(slot, first, n, bitmap)
}

func (s *countedSource) NextPopulated(slot int, first, n uint64) (uint64, error) {
	s.looks.Add(1)
	return s.source.NextPopulated(slot, first, n)
}

// largeMachine makes a machine of two vCPUs that count, whose memory is mostly holes.
func largeMachine(t testing.TB, size uint64, how DirtyTracking) *Machine {
	t.Helper()
	spec := testSpec(t, 2, vmtest.WakeAndCount)
	spec.Memory, spec.Overcommit, spec.Tracking = size, true, how
	m := fromSpec(t, spec, nil)
	check(t, m.Boot())
	startCounting(t, m)
	return m
}

// A large guest that has touched little costs what it has touched: no GET, CLEAR or look
// for each of its slots, chunks or spans.
func TestALargeFreshGuestMoves(t *testing.T) {
	const size = 128 << 30 // of 1 TiB KVM's own tables alone take 2.4 GiB, where it shadows page tables
	for _, how := range []DirtyTracking{TrackBitmap, TrackRing} {
		t.Run(string(how), func(t *testing.T) {
			m := largeMachine(t, size, how)
			at := uint64(size) - 1<<30
			check(t, m.Memory().WriteAt([]byte("far up"), at))
			src := &countedSource{source: m.Source()}
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			check(t, err)
			r := migrate.NewReceiver(&Builder{Overcommit: true, Tracking: how, Log: vmtest.Log(t)}, vmtest.Log(t))
			served := make(chan error, 1)
			go func() { served <- r.Serve(t.Context(), ln) }()
			result, err := migrate.New(src, ln.Addr().String(), migrate.Options{}).Run(t.Context())
			check(t, err)
			to := (<-r.Arrived()).(*Target)
			defer func() { check(t, to.Close()) }()
			awaitChange(t, to.Machine, vmtest.CountAt, word(t, to.Machine, vmtest.CountAt))
			var b [6]byte
			check(t, to.Machine.Memory().ReadAt(b[:], at))
			if string(b[:]) != "far up" {
				t.Errorf("%q arrived", b)
			}
			slots := int64(len(m.mem.Slots()))
			t.Logf("%d slots, %d rounds: %d GETs, %d CLEARs, looked %d times for populated memory; %d pages sent, %d holes, last sync %v",
				slots, len(result.Rounds), src.gets.Load(), src.clears.Load(), src.looks.Load(),
				result.PagesSent, result.PagesHole, result.DowntimeParts.LastSync)
			if slots > 66 {
				t.Errorf("%d slots", slots)
			}
			// Each round fetches before and after it, and so does a stop that is undone.
			most := 2 * (3*int64(len(result.Rounds)) + 8)
			if n := src.gets.Load(); n > most || how == TrackRing && n > 0 {
				t.Errorf("%d GETs in %d rounds, of 2 slots that are touched", n, len(result.Rounds))
			}
			if n := src.clears.Load(); n > most {
				t.Errorf("%d CLEARs in %d rounds, of 2 slots that are touched", n, len(result.Rounds))
			}
			if n := src.looks.Load(); n > size>>30+64 {
				t.Errorf("looked %d times for populated memory in %d GiB", n, size>>30)
			}
			if result.PagesSent > 2048 {
				t.Errorf("%d pages were sent", result.PagesSent)
			}
		})
	}
}

// With KVM_DIRTY_LOG_INITIALLY_SET a slot that is mostly holes starts its log empty and
// armed, and one that is not starts it full. Both report what is written afterwards.
func TestTheLogOfASparseSlotStartsEmpty(t *testing.T) {
	spec := testSpec(t, 2, vmtest.WakeAndCount)
	spec.Memory, spec.Tracking = 2<<30, TrackBitmap
	m := fromSpec(t, spec, nil)
	if m.kernel.caps.dirtyLog&kvm.DirtyLogInitiallySet == 0 {
		t.Skip("SKIPPED: this KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
	}
	check(t, m.Boot())
	startCounting(t, m)
	page := make([]byte, mempage.Size)
	const full = 1 << 30 / mempage.Size / sparseShare
	fill := func(from, n uint64) {
		for i := range n {
			page[0] = byte(i + 1)
			check(t, m.Memory().WriteAt(page, from+i*mempage.Size))
		}
	}
	fill(1<<29, full+1) // in slot 0
	src := m.Source()
	check(t, src.StartDirtyLog())
	defer func() { check(t, src.StopDirtyLog()) }()
	log := mempage.NewBitmap(1 << 30 / mempage.Size)
	check(t, src.FetchDirtyLog(0, log))
	if n := log.Count(); n != 1<<30/mempage.Size {
		t.Errorf("the log of a slot in use starts with %d pages", n)
	}
	done, err := src.TakeDirtyLog(1, func(int, uint64) { t.Error("a page of an untouched slot is in its log") })
	check(t, err)
	if !done {
		t.Error("an untouched slot is not known to be untouched")
	}
	fill(1<<30, 1)
	if done, err = src.TakeDirtyLog(1, func(int, uint64) {}); done || err != nil {
		t.Errorf("after a write to the slot: %v, %v", done, err)
	}
	check(t, src.StopDirtyLog())

	// A page was seen, so it may have been sent, and is gone by the next fetch.
	check(t, src.StartDirtyLog())
	var seen [1]uint64
	check(t, src.Populated(1, 0, 1, seen[:]))
	check(t, m.mem.Zero(1, 0, 1<<30/mempage.Size))
	if done, err = src.TakeDirtyLog(1, func(int, uint64) {}); done || seen[0] != 1 || err != nil {
		t.Errorf("after a page of the slot was seen (%d): %v, %v", seen[0], done, err)
	}
	check(t, src.StopDirtyLog())

	// The counting guest is in slot 0: emptied of the rest, it is sparse too.
	check(t, m.Memory().Punch(1<<29, 1<<29))
	check(t, src.StartDirtyLog())
	was := word(t, m, vmtest.CountAt)
	awaitChange(t, m, vmtest.CountAt, was)
	if done, err = src.TakeDirtyLog(0, func(int, uint64) {}); done || err != nil {
		t.Errorf("a slot that is in use: %v, %v", done, err)
	}
	check(t, src.FetchDirtyLog(0, log))
	if n := log.Count(); n == 0 || n > 64 || !log.Get(vmtest.CountAt/mempage.Size) {
		t.Errorf("the log of a sparse slot has %d pages, that of the counter: %v", n, log.Get(vmtest.CountAt/mempage.Size))
	}
}

// BenchmarkLargeFreshGuest migrates a guest of 1 TiB that has touched little, in one
// process: 100 MiB in one place, or in each of its slots. KVM's own tables take 2.4 GiB at
// each end where it shadows page tables.
func BenchmarkLargeFreshGuest(b *testing.B) {
	for where, places := range map[string]uint64{"one place": 1, "every slot": 64} {
		b.Run(where, func(b *testing.B) { benchmarkLarge(b, places) })
	}
}

func benchmarkLarge(b *testing.B, places uint64) {
	const size = 1 << 40
	m := largeMachine(b, size, TrackAuto)
	for i := range uint64(100<<20) / mempage.Size {
		check(b, m.Memory().WriteAt([]byte{1}, 4<<30+(i%places)*(size/64)+i/places*mempage.Size))
	}
	for b.Loop() {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		check(b, err)
		r := migrate.NewReceiver(&Builder{Overcommit: true}, nil)
		go func() { _ = r.Serve(b.Context(), ln) }()
		result, err := migrate.New(m.Source(), ln.Addr().String(), migrate.Options{}).Run(b.Context())
		check(b, err)
		check(b, m.Close())
		m = (<-r.Arrived()).(*Target).Machine
		b.ReportMetric(float64(result.Total.Milliseconds()), "total-ms")
		b.ReportMetric(float64(result.Setup.Milliseconds()), "setup-ms")
		b.ReportMetric(float64(result.Downtime.Microseconds())/1e3, "downtime-ms")
		b.ReportMetric(float64(result.DowntimeParts.LastSync.Microseconds())/1e3, "last-sync-ms")
	}
	check(b, m.Close())
}
