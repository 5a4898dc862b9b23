package memory

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// needFaults skips the test where memory cannot come later.
func needFaults(t testing.TB) {
	t.Helper()
	if err := PrepareMissing(); err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
}

// elsewhere has the content of missing pages, and brings what is asked for.
type elsewhere struct {
	t       testing.TB
	m       *Memory
	missing atomic.Pointer[Missing]
	asked   chan [3]uint64
	served  atomic.Uint64
	all     sync.WaitGroup
}

// content is the page's content elsewhere.
func content(slot int, page uint64) []byte {
	b := make([]byte, mempage.Size)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(slot)<<32|page|1<<63)
	}
	return b
}

// miss makes every page missing for which lacks is true.
func miss(t testing.TB, m *Memory, lacks func(slot int, page uint64) bool) (*elsewhere, *Missing) {
	t.Helper()
	e := &elsewhere{t: t, m: m, asked: make(chan [3]uint64, 1<<20)}
	var bitmaps [][]uint64
	for i, s := range m.Slots() {
		b := mempage.NewBitmap(s.Size / mempage.Size)
		for p := range s.Size / mempage.Size {
			if lacks(i, p) {
				b.Set(p)
			}
		}
		bitmaps = append(bitmaps, b)
	}
	x, err := m.Miss(bitmaps, func(slot int, first, n uint64) { e.asked <- [3]uint64{uint64(slot), first, n} })
	if err != nil {
		t.Fatal(err)
	}
	e.missing.Store(x)
	e.all.Go(e.serve)
	t.Cleanup(func() { _ = x.Stop(); close(e.asked); e.all.Wait() })
	return e, x
}

func (e *elsewhere) serve() {
	for w := range e.asked {
		for p := w[1]; p < w[1]+w[2]; p++ {
			e.served.Add(1)
			e.bring(int(w[0]), p)
		}
	}
}

func (e *elsewhere) bring(slot int, page uint64) {
	b := make([]byte, 64*mempage.Size)
	copy(b[page%64*mempage.Size:], content(slot, page))
	err := e.missing.Load().Land(slot, page&^63, []uint64{1 << (page % 64)}, b)
	if err != nil && !errors.Is(err, errNoMissing) {
		e.t.Error(err)
	}
}

func eachMissing(t *testing.T, test func(t *testing.T, m *Memory)) {
	needFaults(t)
	for _, b := range []Backing{Anonymous, Memfd, Hugetlb} {
		t.Run(string(b), func(t *testing.T) {
			if b == Hugetlb {
				if err := CheckMissing(b); err != nil {
					t.Skipf("SKIPPED: %v", err)
				}
				needHugePages(t, 4)
			}
			test(t, newMemory(t, 8<<20, b))
		})
	}
}

// What a method of Memory touches has come, from wherever; what is not missing is as it
// was, and a hole reads as zero.
func TestMissingAccess(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		for p := range uint64(64) { // content that is not missing, and content that is old
			check(t, m.WriteAt(bytes.Repeat([]byte{7}, mempage.Size), p*mempage.Size))
		}
		check(t, m.WriteAt([]byte("old"), 520*mempage.Size))
		_, x := miss(t, m, func(_ int, p uint64) bool { return p >= 32 && p < 1024 })
		var got [3 * mempage.Size]byte
		check(t, m.ReadAt(got[:], 30*mempage.Size))
		want := append(bytes.Repeat([]byte{7}, 2*mempage.Size), content(0, 32)...)
		if !bytes.Equal(got[:], want) {
			t.Fatal("a read across what is missing")
		}
		var p [2]int
		check(t, unix.Pipe2(p[:], 0))
		defer unix.Close(p[0])
		defer unix.Close(p[1])
		_, err := unix.Write(p[1], m.ram[520*mempage.Size:][:8]) // as a vCPU, in the kernel
		check(t, err)
		_, err = unix.Read(p[0], got[:8])
		check(t, err)
		if !bytes.Equal(got[:8], content(0, 520)[:8]) {
			t.Fatal("a system call finds old content of what is missing")
		}
		b, err := m.Slice(100*mempage.Size, 2*mempage.Size)
		check(t, err)
		if !bytes.Equal(b, append(content(0, 100), content(0, 101)...)) {
			t.Fatal("a slice of what is missing")
		}
		check(t, m.WriteAt([]byte("new"), 200*mempage.Size+5))
		check(t, m.ReadAt(got[:mempage.Size], 200*mempage.Size))
		want = content(0, 200)
		copy(want[5:], "new")
		if !bytes.Equal(got[:mempage.Size], want) {
			t.Fatal("a write to a part of a missing page")
		}
		check(t, m.ReadAt(got[:mempage.Size], 1500*mempage.Size))
		if !bytes.Equal(got[:mempage.Size], make([]byte, mempage.Size)) {
			t.Fatal("a hole")
		}
		remain := uint64(992 - 5)
		if m.backing == Hugetlb { // the rest of both huge pages has come along
			remain = 0
		}
		for limit := time.Now().Add(time.Minute); x.Left() != remain && time.Now().Before(limit); { // it is counted after it has come
			time.Sleep(time.Millisecond)
		}
		if left := x.Left(); left != remain {
			t.Fatalf("%d pages are left, expected %d", left, remain)
		}
	})
}

// A page that has come does not come again, whatever arrives; one that the guest has given
// up does not come at all.
func TestMissingOnce(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		e, x := miss(t, m, func(_ int, p uint64) bool { return p < 128 })
		e.bring(0, 3)
		check(t, m.WriteAt([]byte("written by the guest"), 3*mempage.Size))
		e.bring(0, 3)
		var got [20]byte
		check(t, m.ReadAt(got[:], 3*mempage.Size))
		if string(got[:]) != "written by the guest" {
			t.Fatalf("overwritten: %q", got)
		}
		check(t, m.Punch(60*mempage.Size, 8*mempage.Size))
		check(t, x.LandZero(0, 0, 8, []uint64{1 << 5}))
		for _, p := range []uint64{5, 60, 63, 64, 67} {
			e.bring(0, p)
			check(t, m.ReadAt(got[:], p*mempage.Size))
			if m.backing == Hugetlb && p == 5 { // it came with page 3
				if !bytes.Equal(got[:], content(0, 5)[:20]) {
					t.Fatal("a page that has come is zero")
				}
			} else if got != [20]byte{} {
				t.Fatalf("page %d is not zero", p)
			}
		}
		left, asked := uint64(128-1-8-1), uint64(0)
		if m.backing == Hugetlb {
			left, asked = 0, 127
		}
		if x.Left() != left || e.served.Load() != asked {
			t.Fatalf("%d left, %d asked for", x.Left(), e.served.Load())
		}
	})
}

// The last page ends it: memory is as any other then, and can be made missing again.
func TestMissingEnds(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		for range 2 {
			e, x := miss(t, m, func(_ int, p uint64) bool { return p%3 == 0 && p < 300 })
			for p := uint64(0); p < 300; p += 3 {
				e.bring(0, p)
			}
			select {
			case <-x.Gone():
			case <-time.After(time.Minute):
				t.Fatal("it does not end")
			}
			if m.Missing() != nil || x.Err() != nil {
				t.Fatal(m.Missing(), x.Err())
			}
			for p := range uint64(300) {
				want := make([]byte, mempage.Size)
				if p%3 == 0 {
					want = content(0, p)
				}
				if !bytes.Equal(m.SlotBytes(0, p, 1), want) {
					t.Fatalf("page %d", p)
				}
			}
			check(t, m.Punch(0, 300*mempage.Size))
		}
	})
}

// Who waits gets an error when the rest is given up; the kernel's faults end.
func TestMissingStops(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		missing := make([]uint64, mempage.Words(m.Size()/mempage.Size))
		missing[0], missing[8] = ^uint64(0), ^uint64(0)
		asked := make(chan uint64, 10)
		x, err := m.Miss([][]uint64{missing}, func(_ int, first, n uint64) { asked <- first })
		check(t, err)
		results := make(chan error, 2)
		go func() { results <- m.ReadAt(make([]byte, 8), 8*mempage.Size) }()
		go func() {
			var p [2]int
			check(t, unix.Pipe2(p[:], 0))
			_, err := unix.Write(p[1], m.ram[521*mempage.Size:][:8]) // a system call that faults
			results <- err
		}()
		<-asked
		<-asked
		if n, _ := x.Waiting(); n != 1 {
			t.Errorf("%d threads wait in the kernel, expected 1", n)
		}
		check(t, x.Stop())
		var failed int
		for range 2 {
			if err := <-results; errors.Is(err, errNoMissing) {
				failed++
			} else if err != nil {
				t.Error(err)
			}
		}
		if failed != 1 || m.Missing() != nil {
			t.Errorf("%d have failed, missing %v", failed, m.Missing())
		}
	})
}

// The collector runs flat out while Go code and system calls touch missing pages, holes
// and what is there, and the guest gives some up. If a goroutine faulted, all would stand still.
func TestMissingWhileCollecting(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		pages := m.Size() / mempage.Size
		for p := uint64(0); p < pages; p += 5 {
			check(t, m.WriteAt([]byte{1}, p*mempage.Size))
		}
		e, x := miss(t, m, func(_ int, p uint64) bool { return p%4 != 0 })
		stop := make(chan struct{})
		var collecting, touching sync.WaitGroup
		for range 2 {
			collecting.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						runtime.GC()
					}
				}
			})
		}
		var p [2]int
		check(t, unix.Pipe2(p[:], 0))
		defer unix.Close(p[0])
		defer unix.Close(p[1])
		for i := range 4 {
			touching.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				var b [mempage.Size]byte
				for range 800 {
					at := r.Uint64N(pages)
					switch r.IntN(4) {
					case 0:
						check(t, m.ReadAt(b[:], at*mempage.Size))
					case 1:
						check(t, m.WriteAt(b[:9], at*mempage.Size))
					case 2: // as a vCPU, in the kernel
						if _, err := unix.Write(p[1], m.ram[at*mempage.Size:][:1]); err != nil {
							t.Error(err)
						} else if _, err := unix.Read(p[0], m.ram[at*mempage.Size:][:1]); err != nil {
							t.Error(err)
						}
					case 3:
						if at%16 == 0 {
							check(t, m.Punch(at*mempage.Size, mempage.Size))
						} else {
							e.bring(0, at)
						}
					}
				}
			})
		}
		done := make(chan struct{})
		go func() { touching.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(5 * time.Minute):
			panic("a goroutine stands still")
		}
		close(stop)
		collecting.Wait()
		check(t, x.Err())
		s := x.Stalls()
		t.Logf("%d pages asked for, %d left, faults %d, local %d, p50 %v, p99 %v, longest %v", e.served.Load(), x.Left(), s.Faults, s.Local, s.Quantile(.5), s.Quantile(.99), s.Longest)
	})
}

// Pages of every kind come on request and in their turn, each more than once, while threads
// read and write them in the kernel and in Go, and give some up. Each finds what it must.
func TestMissingRandom(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		pages := m.Size() / mempage.Size
		// Of each 2 MiB: one page is missing; all are; half; none, and none exists.
		truth, missing := make([]uint64, pages), mempage.NewBitmap(pages)
		for p := range pages {
			kind := p / 512 % 4
			if kind != 3 && r.IntN(4) > 0 {
				truth[p] = p | 1<<40
				check(t, m.WriteAt(bytes.Repeat(binary.LittleEndian.AppendUint64(nil, truth[p]), mempage.Size/8), p*mempage.Size))
			}
			if kind == 0 && p == 77 || kind == 1 || kind == 2 && r.IntN(2) == 0 {
				missing.Set(p)
				truth[p] = 0 // there as well
				if r.IntN(5) > 0 {
					truth[p] = p | 1<<41
				}
			}
		}
		from := bytes.Clone(asBytes(truth))
		wanted := make(chan [2]uint64, pages)
		x, err := m.Miss([][]uint64{missing}, func(_ int, first, n uint64) { wanted <- [2]uint64{first, n} })
		if err != nil {
			t.Fatal(err)
		}
		land := func(first, n uint64) { // pages of a word
			w := first &^ 63
			data, which := make([]byte, 64*mempage.Size), [2]uint64{} // with content, of zeros
			for p := first; p < first+n; p++ {
				v := binary.LittleEndian.Uint64(from[p*8:])
				for i := uint64(0); i < mempage.Size; i += 8 {
					binary.LittleEndian.PutUint64(data[(p-w)*mempage.Size+i:], v)
				}
				if v == 0 {
					which[1] |= 1 << (p - w)
				} else {
					which[0] |= 1 << (p - w)
				}
			}
			if err := errors.Join(x.Land(0, w, which[:1], data), x.LandZero(0, w, 64, which[1:])); err != nil && x.Left() > 0 {
				t.Error(err)
			}
		}
		var bringing, using sync.WaitGroup
		for range 2 {
			bringing.Go(func() {
				for w := range wanted {
					for p := w[0]; p < w[0]+w[1]; p++ {
						land(p, 1)
					}
				}
			})
		}
		bringing.Go(func() {
			r := rand.New(rand.NewPCG(seed, 1))
			for range pages / 16 {
				first := r.Uint64N(pages)
				land(first, min(r.Uint64N(64)+1, 64-first%64))
			}
		})
		const users = 4
		for i := range uint64(users) {
			using.Go(func() {
				r := rand.New(rand.NewPCG(seed, 2+i))
				var p [2]int
				check(t, unix.Pipe2(p[:], 0))
				defer unix.Close(p[0])
				defer unix.Close(p[1])
				var b [8]byte
				for n := range uint64(1500) {
					at := r.Uint64N(pages/users)*users + i // its own pages
					gpa := at*mempage.Size + r.Uint64N(mempage.Size/8)*8
					kernel := r.IntN(2) == 0
					if kernel {
						_, err1 := unix.Write(p[1], m.ram[gpa:][:8])
						_, err2 := unix.Read(p[0], b[:])
						check(t, errors.Join(err1, err2))
					} else {
						check(t, m.ReadAt(b[:], gpa))
					}
					if got := binary.LittleEndian.Uint64(b[:]); got != truth[at] {
						t.Errorf("page %#x: %#x, expected %#x", at, got, truth[at])
						return
					}
					switch r.IntN(4) {
					case 0:
						check(t, m.Punch(at*mempage.Size, mempage.Size))
						truth[at] = 0
					case 1:
						truth[at] = n | 1<<42
						all := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, truth[at]), mempage.Size/8)
						if kernel {
							_, err1 := unix.Write(p[1], all)
							_, err2 := unix.Read(p[0], m.ram[at*mempage.Size:][:mempage.Size])
							check(t, errors.Join(err1, err2))
						} else {
							check(t, m.WriteAt(all, at*mempage.Size))
						}
					}
				}
			})
		}
		using.Wait()
		for at := uint64(0); at < pages; at += 64 {
			land(at, 64)
		}
		<-x.Gone()
		close(wanted)
		bringing.Wait()
		check(t, x.Err())
		for p := range pages {
			want := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, truth[p]), mempage.Size/8)
			if !bytes.Equal(m.SlotBytes(0, p, 1), want) {
				t.Fatalf("page %#x: %x, expected %#x", p, m.SlotBytes(0, p, 1)[:8], truth[p])
			}
		}
		// What has anything in it is found by who looks for what exists.
		populated := mempage.NewBitmap(pages)
		check(t, m.Populated(0, 0, pages, populated))
		for p := range pages {
			if truth[p] != 0 && !populated.Get(p) {
				t.Fatalf("page %#x has content, and counts as a hole", p)
			}
		}
	})
}

// asBytes returns the words in little-endian order.
func asBytes(words []uint64) (b []byte) {
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

// After Stop the pages that have not come are zero, and those that have, and those that were
// there, are found by who looks for what exists: a migration that goes on needs that.
func TestMissingStopsPartly(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		pages := m.Size() / mempage.Size
		for p := range pages {
			check(t, m.WriteAt(content(0, p), p*mempage.Size))
		}
		e, x := miss(t, m, func(_ int, p uint64) bool { return p%2 == 0 })
		for p := uint64(0); p < pages; p += 4 {
			e.bring(0, p)
		}
		check(t, x.Stop())
		populated := mempage.NewBitmap(pages)
		check(t, m.Populated(0, 0, pages, populated))
		for p := range pages {
			want := content(0, p)
			if p%4 == 2 {
				clear(want)
			} else if !populated.Get(p) {
				t.Fatalf("page %d counts as a hole", p)
			}
			if !bytes.Equal(m.SlotBytes(0, p, 1), want) {
				t.Fatalf("page %d: %x", p, m.SlotBytes(0, p, 1)[:8])
			}
		}
	})
}

// Drop keeps what is not named, and Miss refuses what does not fit.
func TestDrop(t *testing.T) {
	eachMissing(t, func(t *testing.T, m *Memory) {
		for p := range uint64(100) {
			check(t, m.WriteAt([]byte{9}, p*mempage.Size))
		}
		set := mempage.NewBitmap(m.Size() / mempage.Size)
		set.SetRange(10, 50)
		check(t, m.Drop(0, set))
		for p := range uint64(100) {
			if gone := m.SlotBytes(0, p, 1)[0] == 0; gone != (set.Get(p) && m.backing != Hugetlb) {
				t.Fatalf("page %d: gone %v", p, gone)
			}
		}
		if err := m.Drop(0, set[:1]); err == nil {
			t.Error("a short bitmap is accepted")
		}
		if _, err := m.Miss(nil, nil); err == nil {
			t.Error("no bitmap is accepted")
		}
	})
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
