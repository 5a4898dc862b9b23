package memory

import (
	"errors"
	"io"
	"net"
	"testing"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// The measurements on which DefaultBacking is based; docs/benchmarks.md has results.

// benchmarkBackings are the backings, and anonymous memory without huge pages.
var benchmarkBackings = []struct {
	name    string
	backing Backing
	small   bool
}{
	{"memfd", Memfd, false},
	{"anonymous", Anonymous, false},
	{"anonymous-4k", Anonymous, true},
	{"hugetlb", Hugetlb, false},
}

// eachBacking runs f with every backing. fresh returns new memory.
func eachBacking(b *testing.B, size uint64, f func(b *testing.B, fresh func() *Memory)) {
	for _, v := range benchmarkBackings {
		b.Run(v.name, func(b *testing.B) {
			if v.backing == Hugetlb {
				needHugePages(b, size/hugePageSize)
			}
			f(b, func() *Memory {
				m, err := New(size, v.backing)
				if err != nil {
					b.Fatal(err)
				}
				if v.small {
					if err := unix.Madvise(m.ram, unix.MADV_NOHUGEPAGE); err != nil {
						b.Fatal(err)
					}
				}
				return m
			})
		})
	}
}

// BenchmarkPopulate measures the first use of memory: a write to each page, filling
// it, and reading into it from loopback TCP, like a migration's destination. "again"
// reads into populated memory.
func BenchmarkPopulate(b *testing.B) {
	const size = 512 << 20
	for _, way := range []struct {
		name  string
		twice bool
		use   func(b *testing.B, ram []byte)
	}{
		{"touch", false, func(_ *testing.B, ram []byte) {
			for i := 0; i < len(ram); i += mempage.Size {
				ram[i] = 1
			}
		}},
		{"fill", false, func(_ *testing.B, ram []byte) {
			for i := range ram {
				ram[i] = 1
			}
		}},
		{"tcp", false, receive},
		{"tcp-again", true, receive},
	} {
		b.Run(way.name, func(b *testing.B) {
			eachBacking(b, size, func(b *testing.B, fresh func() *Memory) {
				b.SetBytes(size)
				for range b.N {
					b.StopTimer()
					m := fresh()
					if way.twice {
						way.use(b, m.ram)
					}
					b.StartTimer()
					way.use(b, m.ram)
					b.StopTimer()
					if err := m.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
		})
	}
}

// receive fills ram from a TCP connection over loopback with reads of 1 MiB.
func receive(b *testing.B, ram []byte) {
	const chunk = 1 << 20
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	sent := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			sent <- err
			return
		}
		data := make([]byte, chunk)
		for i := range data {
			data[i] = byte(i)
		}
		for left := len(ram); left > 0 && err == nil; left -= chunk {
			_, err = conn.Write(data)
		}
		sent <- errors.Join(err, conn.Close())
	}()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	for at := 0; at < len(ram); at += chunk {
		if _, err := io.ReadFull(conn, ram[at:at+chunk]); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-sent; err != nil {
		b.Fatal(err)
	}
}

// BenchmarkPopulated measures finding the holes of a slot of 1 GiB: empty, full, and
// with every other page populated.
func BenchmarkPopulated(b *testing.B) {
	for _, state := range []struct {
		name  string
		every int // every nth page is written
	}{{"empty", 0}, {"full", 1}, {"every-other", 2}} {
		b.Run(state.name, func(b *testing.B) {
			eachBacking(b, minSlotSize, func(b *testing.B, fresh func() *Memory) {
				m := fresh()
				defer func() { _ = m.Close() }()
				for i := 0; state.every > 0 && i < len(m.ram); i += state.every * mempage.Size {
					m.ram[i] = 1
				}
				bitmap := make([]uint64, mempage.Words(minSlotSize>>mempage.Shift))
				ask := func(b *testing.B) {
					for b.Loop() {
						if err := m.Populated(0, 0, minSlotSize>>mempage.Shift, bitmap); err != nil {
							b.Fatal(err)
						}
					}
				}
				if m.pagemap == nil {
					ask(b)
					return
				}
				b.Run("scan", func(b *testing.B) {
					if !m.pagemap.scan {
						b.Skip("SKIPPED: this kernel has no PAGEMAP_SCAN")
					}
					ask(b)
				})
				b.Run("entries", func(b *testing.B) {
					before := m.pagemap.scan
					defer func() { m.pagemap.scan = before }()
					m.pagemap.scan = false
					ask(b)
				})
			})
		})
	}
}
